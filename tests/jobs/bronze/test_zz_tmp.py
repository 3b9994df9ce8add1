import json
import random

import pytest

from jobs.core.plan import Thresholds
from jobs.core.tables import *
from jobs.ops import explain, maintain
from tests.support.spark_tools import CLICKS, Workshop

T = 1_700_000_000


@pytest.mark.parametrize("spark_merge", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_x(spark, tmp_path, native, spark_merge):
    toml = CLICKS.replace("csv", "jsonl").replace(
        'event_ts = "ts"',
        'event_ts = "ts"\nsource_session_id="s"\n' + ('event_id="id"\n' if native else ""),
    )
    if native:
        toml += '[sessions]\nrule = "source_session_id"\n'
    toml += "[quality]\nmax_reject_share = 0.9\n"
    shop = Workshop(
        spark,
        tmp_path,
        toml,
        Thresholds(few_moved=-1, merged_rows=-1, few_bytes=-1, smallest_slice=10)
        if spark_merge
        else None,
    )

    def rows(night, n):
        rng = random.Random(night)
        out = []
        for k in range(n):
            big = rng.choice([3, 100, 2049, 2500, 3000, 5000, 70_000])
            out.append(
                {
                    "user": rng.choice(["u1", "u2", "U" * 2100]),
                    "item": rng.choice("abc") * big,
                    "ts": T + night * 86_400 + 30 * k,
                    "s": "s" * rng.choice([1, 2100]),
                    "id": f"e{k}" if native else None,
                }
            )
            if rng.random() < 0.3:
                out.append(
                    {
                        "user": "u1",
                        "item": "z" * rng.choice([5, 2500]),
                        "ts": "x" * rng.choice([3, 3000]),
                        "id": "q",
                    }
                )
        return "".join(json.dumps(r) + "\n" for r in out)

    for night in range(4):
        shop.land(f"{night}.jsonl", rows(night, 40) + (rows(night - 1, 10) if night else ""))
        if night == 2:
            shop.land("0.jsonl", rows(0, 40) + rows(5, 5))
        day = f"2023-11-{14 + night}"
        r = shop.run(day=day)
        print(r.counts(), r.rejects)
        r = shop.run(day=day)
        shop.run("drift", day=day)
    shop.run("replay-rejects")
    shop.run("validate")
    sid = shop.rows(SESSIONS)[0]["session_id"]
    explain.in_words(explain.explain(str(shop.lake_root), shop.source, sid))
    print(maintain.maintain(shop.context(), 0, {}))
    shop.land("9.jsonl", rows(9, 30))
    shop.run()
    shop.run(options={"rebuild": True})
    shop.run(options={"reload": True})
    shop.run("validate")
