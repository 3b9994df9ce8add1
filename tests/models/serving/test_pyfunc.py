"""What MLflow serves: code with a name of its own, ids as they are, the newest event, no padding."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

from models.core.errors import UserError
from models.networks.methods import BACKBONES, SESSION_ENCODERS
from models.registry import register
from models.registry.packaging import Package, closure, package
from tests.support.served_tools import (
    HOUR,
    WIRE,
    events,
    listening,
    over,
    packed,
    put_in,
    scores,
    untrained,
)

ODD = [
    "00123", "123", "1e5", "100000", "nan", "NaN", "NA", "N/A", "<NA>", "null", "NULL", "None", "NaT",
    "inf", "-inf", "1.0", "1", "true", "True", " x", "x", "x ", "\tx", "é", "e\u0301", "日本", "a\0b",
    "a", "2024-01-01", "1_000", "0x10", "\u00a0", "[]", "\"x\"", "1,5",
]  # fmt: skip
ITEMS = [f"i{number:02d}" for number in range(12)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that tests put other weights in."""
    return mlflow.pyfunc.load_model(
        str(packed(untrained("pop", ITEMS), tmp_path_factory.mktemp("any")))
    )


# -- code with a name of its own -----------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


TREE = {
    "__init__.py": "",
    "serving/__init__.py": "",
    "serving/entry.py": (
        "from typing import TYPE_CHECKING\n"
        "from shop.serving import lists as told, recommend\n"
        "if TYPE_CHECKING:\n    from shop.train import fit\nelse:\n    from shop.other import fit\n"
        "class SessionRecommender: pass\n"
    ),
    "serving/recommend.py": (
        "from ..networks.deep import gru\nfrom . import texts\n"
        "def recommend():\n    from  shop.networks import (\n        late,\n    )\n    return late.NAME\n"
    ),
    "serving/lists.py": "'é'; from shop.core import VALUE; from shopping import cart\n",
    "serving/texts.py": "import json\n",
    "networks/__init__.py": "",
    "networks/late.py": "NAME = __name__\n",
    "networks/deep/__init__.py": "from .gru import GRU\n",
    "networks/deep/gru.py": "GRU = 1\n",
    "core.py": "VALUE = 'shop.core'  # from shop.core import VALUE\n",
    "other.py": "fit = 2\n",
    "train.py": "from shop.report import page\n",
    "report.py": "",
}


def test_the_closure_follows_imports_into_nested_packages(tmp_path: Path) -> None:
    found = closure(write(tmp_path / "shop", TREE), "shop.serving.entry")
    left_out = {"shop.train", "shop.report"}
    every = {
        "shop." + name.removesuffix(".py").replace("/", ".").removesuffix("__init__")
        for name in TREE
    }
    assert set(found) == {name.removesuffix(".") for name in every} - left_out
    assert found["shop.networks.deep"] == tmp_path / "shop/networks/deep/__init__.py"


def test_a_package_has_its_own_name_and_works_under_it(tmp_path: Path) -> None:
    made = package(write(tmp_path / "shop", TREE), "shop.serving.entry")
    assert made.entry == f"{made.name}.serving.entry"
    lists = made.files["serving/lists.py"]
    assert lists == f"'é'; from {made.name}.core import VALUE; from shopping import cart\n"
    assert made.files["core.py"] == TREE["core.py"], "only statements are rewritten"
    made.files["serving/lists.py"] = lists.replace("; from shopping import cart", "")
    loader, folder = made.write(tmp_path / "there")
    with made.importable(tmp_path / "there"):
        entry = __import__(made.entry, fromlist=["*"])
        assert entry.recommend.recommend() == f"{made.name}.networks.late"
        assert entry.SessionRecommender.__module__ == made.entry
    assert folder.name == made.name and made.entry in loader.read_text()
    assert not [name for name in sys.modules if name.startswith(made.name)]
    assert str(tmp_path / "there") not in sys.path


def test_the_name_depends_on_the_contents_alone(tmp_path: Path) -> None:
    one = package(write(tmp_path / "here" / "shop", TREE), "shop.serving.entry")
    other = package(write(tmp_path / "there" / "shop", TREE), "shop.serving.entry")
    assert one == other
    for changed in ("core.py", "networks/deep/gru.py", "__init__.py"):
        tree = TREE | {changed: TREE[changed] + "\nTODAY = 1\n"}
        again = package(write(tmp_path / changed / "shop", tree), "shop.serving.entry")
        assert again.name != one.name, changed
    tree = TREE | {"train.py": "TODAY = 1"}
    same = package(write(tmp_path / "same" / "shop", tree), "shop.serving.entry")
    assert same.name == one.name, "what is not shipped does not count"


def test_a_second_package_is_shipped_below_the_same_name(tmp_path: Path) -> None:
    """What is imported of it, under the one name: nothing is found of a package of its old name."""
    rules = {"__init__.py": "", "cut.py": "from rules.gap import GAP\n", "gap.py": "GAP = 1800\n",
             "suite.py": "import great\n"}  # fmt: skip
    core = "from rules.cut import GAP\ndef gap():\n    from rules import cut\n    return cut.GAP\n"
    root, beside = write(tmp_path / "shop", TREE | {"core.py": core + "VALUE = GAP\n"}), (
        write(tmp_path / "rules", rules),
    )  # fmt: skip
    made = package(root, "shop.serving.entry", beside)
    assert set(made.files) - set(TREE) == {"rules/__init__.py", "rules/cut.py", "rules/gap.py"}
    assert made.files["rules/cut.py"] == f"from {made.name}.rules.gap import GAP\n"
    made.files["serving/lists.py"] = f"from {made.name}.core import VALUE, gap\n"
    made.write(tmp_path / "there")
    with made.importable(tmp_path / "there"):
        entry = __import__(made.entry, fromlist=["*"])
        assert (entry.told.VALUE, entry.told.gap()) == (1800, 1800)
        assert f"{made.name}.rules.gap" in sys.modules and "rules" not in sys.modules
    (tmp_path / "rules/gap.py").write_text("GAP = 900\n")
    assert package(root, "shop.serving.entry", beside).name != made.name
    (tmp_path / "rules/gap.py").write_text("import rules.suite\nGAP = 900\n")
    with pytest.raises(UserError, match=r"gap.py, line 1: .*cannot be shipped"):
        package(root, "shop.serving.entry", beside)


@pytest.mark.parametrize(
    "line",
    [
        "import shop.core",
        "import shop.core as core",
        "import importlib; importlib.import_module('shop.core')",
        "from importlib import import_module; import_module('shop.core')",
        "__import__('shop.core')",
        "open(__file__)",
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path: Path, line: str) -> None:
    root = write(tmp_path / "shop", TREE | {"core.py": f"\n{line}\nVALUE = 1\n"})
    with pytest.raises(UserError, match=r"core.py, line 2: .*cannot be shipped"):
        package(root, "shop.serving.entry")


def shipped() -> Package:
    return package(register.ROOT, register.ENTRY, register.BESIDE)


def test_a_version_ships_what_serving_needs() -> None:
    made = shipped()
    names = {Path(path).stem for path in made.files}
    assert {"answer", "saved_model", "sessionrec", "hstu", "session_rule"} <= names
    unwanted = ("fit", "report", "register", "tracking", "grid", "gate", "run", "compare", "check")
    assert not names & {*unwanted, "packaging", "checkpoints", "results", "sessions", "__main__"}
    for path, text in made.files.items():
        for root in ("models", "expectations"):
            assert f"from {root}" not in text and f"import {root}" not in text, path


def test_requirements_name_what_shipped_code_imports() -> None:
    import ast

    found = set()
    for text in shipped().files.values():
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) - {shipped().name} <= set(register.REQUIREMENTS)


THEIRS = {
    "models/__init__.py": "REGISTRY = ['a django app']\n",
    "models/views.py": "from models import REGISTRY\nSHOWN = REGISTRY + ['views']\n",
    "models/serving.py": "def recommend():\n    return 'nothing of the kind'\n",
}
BESIDE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jobs", "pyspark", "delta", "airflow", "deltalake"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
import models  # theirs
import pandas as pd
import mlflow.pyfunc

frame = pd.DataFrame({"user_id": ["ann"], "item_id": ["i03"],
                      "event_ts": pd.to_datetime(["2024-01-01T10:00Z"])})
loaded = [mlflow.pyfunc.load_model(path) for path in sys.argv[2:]]
top = [one.predict(frame, params={"k": 1})["items"][0][0]["score"] for one in loaded]
again = [one.predict(frame, params={"k": 1})["items"][0][0]["score"] for one in loaded]
kinds = [type(one.unwrap_python_model()).__module__ for one in loaded]
from models import serving, views
print(json.dumps({
    "top": top, "again": again, "kinds": kinds, "recommend": serving.recommend(),
    "views": views.SHOWN, "file": models.__file__,
    "ours": [name for name in sys.modules if name.split(".")[0] == "models"],
}))
"""


@pytest.fixture(scope="module")
def two_commits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The same weights from two commits, that differ deep in what is shipped; the first one twice."""
    folder = tmp_path_factory.mktemp("commits")
    stored = untrained("gru4rec+st", ITEMS)
    now, again = packed(stored, folder / "now"), packed(stored, folder / "again")
    shutil.copytree(register.ROOT, folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    changed = folder / "models" / "networks" / "gru4rec.py"
    line = "return rolled(h, -pads)"
    assert line in changed.read_text()
    changed.write_text(changed.read_text().replace(line, "return 1000 * rolled(h, -pads)"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(register, "ROOT", folder / "models")
        return now, again, packed(stored, folder / "later")


def test_versions_of_two_commits_beside_a_package_called_models(
    two_commits: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    now, again, later = map(str, two_commits)
    theirs = write(tmp_path / "theirs", THEIRS)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", BESIDE, str(theirs), now, later, again],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    first, changed, same = told["top"]
    assert first == same and told["again"] == told["top"]
    assert changed == pytest.approx(1000 * first, rel=1e-4), "each runs its own code"
    kinds = told["kinds"]
    assert kinds[0] == kinds[2] == f"{shipped().name}.serving.pyfunc" and kinds[1] != kinds[0]
    assert told["views"] == ["a django app", "views"]
    assert told["recommend"] == "nothing of the kind"
    assert told["file"] == str(theirs / "models" / "__init__.py")
    assert set(told["ours"]) == {"models", "models.serving", "models.views"}
    # Nor is one that is imported later shadowed: what a version adds to the path has one package.
    for version, module in zip((now, later, again), kinds, strict=True):
        assert os.listdir(Path(version) / "code") == [module.removesuffix(".serving.pyfunc")]


@contextmanager
def imports_kept() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path


V_0_1_0 = """
from __future__ import annotations
from pathlib import Path
from typing import Any
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from models.serving import recommend
from models.store import load

class SessionRecommender(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        self.stored = load(Path(context.artifacts["model"]))

    def predict(self, context, model_input, params=None):
        given = {name: value for name, value in (params or {}).items() if value is not None}
        return recommend(
            self.stored, model_input, int(given.get("k", 10)), str(given.get("request_ts", ""))
        )

set_model(SessionRecommender())
"""


def test_a_version_of_0_1_0_loads_beside_this_repository(
    two_commits: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """It shipped a package `models`; here it finds ours, and asks it as it always did."""
    (tmp_path / "pyfunc.py").write_text(V_0_1_0)
    trained = two_commits[0].parent / "trained"
    with imports_kept():
        with register.served(trained) as parts:
            old = {"python_model": str(tmp_path / "pyfunc.py"), "code_paths": [str(register.ROOT)]}
            mlflow.pyfunc.save_model(str(tmp_path / "old"), **(parts | old))
        old_one, new_one = (
            mlflow.pyfunc.load_model(str(path)) for path in (tmp_path / "old", two_commits[0])
        )
    frame = events("ann", ["i03", "i04"])
    assert old_one.predict(frame, params={"k": 3}).equals(new_one.predict(frame, params={"k": 3}))


# -- ids as they are -----------------------------------------------------------------------------


@pytest.fixture
def odd(loaded: Any, tmp_path: Path) -> Any:
    """Answers a history of one item with that item, then with the first ones of ODD; sessions are
    cut by their ids."""
    stored = untrained("personal_top", ODD)
    stored.facts["session_rule"] = "source_session_id"
    stored.model.count.copy_(stored.popularity)  # type: ignore[operator]
    put_in(loaded, stored, tmp_path)
    return loaded


def odd_events() -> pd.DataFrame:
    """User, item, session and what was shown: each of ODD once."""
    return pd.DataFrame(
        {
            "user_id": ODD, "item_id": ODD,
            "event_ts": pd.date_range("2024-01-01", periods=len(ODD), freq="s", tz="UTC"),
            "source_session_id": ODD, "event_type": ODD,
            "exposed_with": [[one, None, "never seen"] for one in ODD],
        }
    )  # fmt: skip


@pytest.mark.parametrize("wire", ["frame", *WIRE])
def test_ids_come_through_as_they_are(odd: Any, wire: str) -> None:
    frame = odd_events()
    answer = odd.predict(frame) if wire == "frame" else over(wire, odd, frame)
    assert answer["user_id"].tolist() == ODD
    assert [items[0]["item_id"] for items in answer["items"]] == ODD
    ear = listening(odd)
    _ = odd.predict(frame) if wire == "frame" else over(wire, odd, frame)
    (rows,) = ear.heard
    assert rows.item.tolist() == rows.shown.tolist() == list(range(1, len(ODD) + 1))
    assert rows.shown_start.tolist() == list(range(len(ODD) + 1))


@pytest.mark.parametrize("wire", ["frame", *WIRE])
def test_sessions_are_told_apart_by_their_ids_and_nulls_are_nulls(odd: Any, wire: str) -> None:
    native = [*ODD, None, None]
    frame = events("ann", [ODD[0]] * len(native)).assign(
        source_session_id=native, exposed_with=None
    )
    frame = pd.concat([frame, pd.DataFrame({"user_id": ["bob"], "item_id": [None]})])
    frame = frame.astype(object).where(frame.notna(), None).reset_index(drop=True)
    ear = listening(odd)
    answer = odd.predict(frame) if wire == "frame" else over(wire, odd, frame)
    assert answer["user_id"].tolist() == ["ann", "bob"]
    (rows,) = ear.heard
    assert rows.ordinal.tolist() == [*range(1, len(ODD) + 1), len(ODD) + 1, len(ODD) + 1]
    assert rows.shown.tolist() == []


def test_csv_is_refused_as_pandas_would_misread_ids(odd: Any) -> None:
    schema = odd.metadata.get_input_schema()
    line = "user_id,item_id,event_ts\nann,{},2024-01-01T10:00:00Z\n"
    for item in ("NA", "x"):
        with pytest.raises(MlflowException, match="Failed to parse input as a Pandas DataFrame"):
            scoring_server.invocations(line.format(item), "text/csv", odd, schema)
    # Without a schema, as `mlflow models predict -t csv` reads it, and people do:
    for item, says in (
        ("00123", "item_id = 123: ids are texts"), ("1e5", "item_id = 100000.0: ids are texts"),
        ("true", "item_id = True: ids are texts"), ("inf", "item_id = inf: ids are texts"),
        ("NA", "item_id is NaN in 1 of the rows that have an event_ts"), ("null", "keep_default_na"),
        ("nan", "keep_default_na"), ("None", "keep_default_na"), ("", "keep_default_na"),
    ):  # fmt: skip
        text = line.format(item)
        read = scoring_server.parse_csv_input(io.StringIO(text))
        with pytest.raises(ValueError, match=says):
            odd.predict(read)
        whole = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        top = odd.predict(whole)["items"][0][0]["item_id"]
        assert top == (item if item in ODD else ODD[0])
    nobody = pd.read_csv(io.StringIO("user_id,item_id,event_ts\nann,,\n"))
    assert odd.predict(nobody)["items"][0][0]["item_id"] == ODD[0]


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("user_id", 7, "user_id = 7: ids are texts"),
        ("source_session_id", 1.5, "source_session_id = 1.5: ids are texts"),
        ("event_type", 3, "event_type = 3: types of events are texts"),
        ("exposed_with", ["x", 5], "exposed_with = 5: ids are texts"),
        ("exposed_with", "x", "exposed_with = 'x': give a list"),
        ("item_id", ["x", "x"], "a row is one event"),
        ("item_id", b"x", "ids are texts"),
    ],
)
def test_what_is_no_text_is_refused(odd: Any, column: str, value: Any, says: str) -> None:
    frame = events("ann", ["x", "x"])
    frame[column] = pd.Series([value, value], dtype=object)
    with pytest.raises(ValueError, match=says):
        odd.predict(frame)


def test_users_whose_ids_differ_behind_a_zero_character_are_two(odd: Any) -> None:
    frame = pd.concat([events("a", ["x"]), events("a\0b", ["x "])])
    answer = odd.predict(frame, params={"k": 1})
    assert answer["user_id"].tolist() == ["a", "a\0b"]
    assert [items[0]["item_id"] for items in answer["items"]] == ["x", "x "]


# -- the newest event counts, padding does not ---------------------------------------------------

LENGTH = 6
EVERY = [*BACKBONES, *(f"{name}+st" for name in BACKBONES), *SESSION_ENCODERS]
WHOLE = [f"{name}+st+sse+tsa+fb+habit" for name in BACKBONES]
WHOLE += [f"{name}+sse+tsa+habit" for name in SESSION_ENCODERS]


@pytest.mark.parametrize("policy", ["last_event", "known"])
@pytest.mark.parametrize("method", EVERY + WHOLE)
def test_the_newest_event_counts_however_long_the_history(
    loaded: Any, tmp_path: Path, method: str, policy: str
) -> None:
    """Around L, in one session and with a session for each event (and so its token)."""
    stored = untrained(method, ITEMS, max_len=LENGTH, request_time=policy)
    put_in(loaded, stored, tmp_path)
    counts = (1, 2, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 5 * LENGTH + 1)
    cases = [(apart, count) for apart in (1, HOUR) for count in counts]
    frame = pd.concat(
        events(
            f"{apart} {count} {newest}",
            [*(ITEMS[number % 5] for number in range(count - 1)), newest],
            apart_s=apart,
        )
        for apart, count in cases
        for newest in ("i06", "i07")
    )
    when = (frame["event_ts"].max() + pd.Timedelta(hours=1)).isoformat()
    asked = {"k": len(ITEMS), "request_ts": when if policy == "known" else ""}
    answer = loaded.predict(frame, params=asked)
    for apart, count in cases:
        one, other = (scores(answer, f"{apart} {count} {newest}") for newest in ("i06", "i07"))
        assert set(one) == set(other) == set(ITEMS)
        assert max(abs(one[item] - other[item]) for item in ITEMS) > 1e-4, (apart, count)


@pytest.mark.parametrize("policy", ["last_event", "known"])
@pytest.mark.parametrize("method", ["gru4rec+fb", "sasrec+st+fb", "bert4rec+st+fb"])
def test_what_was_shown_does_not_push_the_newest_event_out(
    loaded: Any, tmp_path: Path, method: str, policy: str
) -> None:
    put_in(loaded, untrained(method, ITEMS, max_len=LENGTH, request_time=policy), tmp_path)
    frame = pd.concat(events(item, ["i00", "i01", item], apart_s=HOUR) for item in ("i06", "i07"))
    shown = [one for one in ITEMS if one not in ("i06", "i07")]
    answer = loaded.predict(
        frame.assign(exposed_with=2 * [None, None, shown]), params={"k": len(ITEMS)}
    )
    one, other = scores(answer, "i06"), scores(answer, "i07")
    assert max(abs(one[item] - other[item]) for item in ITEMS) > 1e-5


def spoil(model: Any, tokens: int) -> list[str]:
    """Set to 1e3 what stands for padding only, where rows have `tokens` tokens; names of it."""
    done = []
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            rows: Any = None
            if name == "item.weight" or name in ("output.weight", "output.bias", "side.value"):
                rows = [0]
            elif name == "backbone.position":
                rows = range(len(tensor) - tokens)
            elif name.endswith(".position"):  # of distances
                middle = len(tensor) // 2
                rows = [at for at in range(len(tensor)) if abs(at - middle) >= tokens]
            elif name.endswith("unused_segment"):
                rows = range(len(tensor))
            if rows is not None:
                chosen = tensor[list(rows)]
                # Of both signs: a norm takes what is the same in all places away.
                sign = 1 - 2 * (torch.arange(chosen.shape[-1]) % 2)
                tensor[list(rows)] = 1e3 * sign.expand_as(chosen).to(chosen.dtype)
                done.append(name)
    return done


@pytest.mark.parametrize("method", EVERY + WHOLE + ["bert4rec reference", "sasrec reference"])
def test_padding_changes_no_score(loaded: Any, tmp_path: Path, method: str) -> None:
    """A short history beside one that fills the window; padding's rows and positions at 1e3."""
    name, _, reference = method.partition(" ")
    settings = {"preset": "paper_a_steam", "dim": 8, "layers": 2} if reference else {}
    stored = untrained(name, ITEMS, max_len=24, **settings)
    inside = put_in(loaded, stored, tmp_path)
    frame = pd.concat(
        [events("short", ["i03", "i04"]), events("long", [*ITEMS, *ITEMS], apart_s=HOUR)]
    )
    asked = {"k": len(ITEMS)}
    before = scores(loaded.predict(frame, params=asked), "short")
    # Two events, perhaps a session token, perhaps [MASK].
    done = spoil(inside.model, 2 + ("+st" in name) + inside.model.cloze)
    assert "item.weight" in done
    assert ("output.weight" in done) == bool(reference)
    transformer = "sasrec" in name or "bert4rec" in name
    assert ("backbone.position" in done) == transformer
    after = scores(loaded.predict(frame, params=asked), "short")
    assert after == pytest.approx(before, abs=1e-5)
    # And what is no padding does change them.
    with torch.no_grad():
        inside.model.item.weight[ITEMS.index("i04") + 1] *= -1
    other = scores(loaded.predict(frame, params=asked), "short")
    assert max(abs(other[item] - after[item]) for item in ITEMS if item != "i04") > 1e-4
