"""How a candidate is judged: suites by Spark or Arrow, Great Expectations, Data Docs. Knows no layer."""
