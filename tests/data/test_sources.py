"""Loading: files, folders, names, hubs, the syntax of --dataset, splitting and mixing."""

import collections
import json
import logging
import sys
import types

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from swiftmeg.data.sources import hubs, registry
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.sources.readers import data_files
from swiftmeg.data.sources.registry import DatasetInfo, Subset, register_dataset
from swiftmeg.errors import UserError


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_by_name", dict(registry._by_name))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def numbered(tmp_path, count, name="data.jsonl", start=0):
    rows = [{"query": f"q{index}", "response": str(start + index)} for index in range(count)]
    return write(tmp_path / name, rows)


def answers(rows):
    return [messages[-1]["content"] for messages in rows["messages"]]


def numbers(rows):
    return [int(answer) for answer in answers(rows)]


def refuses(message, specs, **options):
    with pytest.raises(UserError, match=message) as raised:
        load_rows(specs, **options)
    assert "\n" not in str(raised.value)


# Files.


@pytest.mark.parametrize("num_proc", [1, 2])
def test_every_kind_of_file(tmp_path, num_proc):
    rows = [{"query": "a", "response": "1,\n2"}, {"query": "b", "response": "你好\u2028x"}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    write(tmp_path / "c.json", rows)
    (tmp_path / "d.csv").write_text('query,response\na,"1,\n2"\nb,你好\u2028x\n')
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name, places in [
        *(("a.jsonl", (1, 2)), ("b.json", (1, 2)), ("c.json", (1, 2))),
        *(("d.csv", (3, 4)), ("e.parquet", (1, 2))),
    ]:
        loaded, val = load_rows([name], dataset_shuffle=False, dataset_num_proc=num_proc)
        assert val is None
        assert answers(loaded) == ["1,\n2", "你好\u2028x"]
        assert loaded.column_names == ["messages", "origin"]
        assert loaded["origin"][:] == [f"{name}:{place}" for place in places]


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\n  t\rwo\r\n")
    loaded, _ = load_rows(["a.txt"], dataset_shuffle=False)
    assert loaded["messages"][:] == [
        [{"role": "assistant", "content": "one"}],
        [{"role": "assistant", "content": "  t\rwo"}],
    ]
    assert loaded["origin"][:] == ["a.txt:1", "a.txt:3"]


def test_rows_may_differ_in_their_columns(tmp_path):
    write(
        tmp_path / "a.jsonl",
        [
            {"query": "a", "response": "1", "id": 3},
            {"messages": [{"role": "user", "content": "b", "weight": 1}], "id": "x"},
            {"text": "2", "tools": [{"name": "f", "parameters": {"x": 1}}]},
            {"text": "3", "tools": [{"name": "g", "parameters": {"y": []}}]},
        ],
    )
    loaded, _ = load_rows(["a.jsonl"], dataset_shuffle=False, for_training=False)
    assert loaded["tools"][:] == [
        *(None, None),
        *('[{"name": "f", "parameters": {"x": 1}}]', '[{"name": "g", "parameters": {"y": []}}]'),
    ]
    assert loaded.column_names == ["messages", "tools", "origin"]


def test_a_folder(tmp_path):
    numbered(tmp_path, 2, "folder/b.jsonl", start=2)
    numbered(tmp_path, 2, "folder/a.jsonl")
    (tmp_path / "folder" / "README.md").write_text("about")
    (tmp_path / "folder" / "dataset_infos.json").write_text("{}")
    numbered(tmp_path, 1, "folder/sub/c.jsonl", start=9)
    assert numbers(load_rows(["folder"], dataset_shuffle=False)[0]) == [0, 1, 2, 3]
    assert numbers(load_rows(["folder:sub"])[0]) == [9]
    assert numbers(load_rows(["folder:all#1"])[0]) == [9]
    refuses("there is no subfolder other in folder", ["folder:other"])
    refuses("folder/a.jsonl is a file and has no subsets", ["folder/a.jsonl:sub"])
    (tmp_path / "empty").mkdir()
    refuses("--dataset empty: no data file in the folder empty; looked for .jsonl", ["empty"])


def test_only_the_training_split_of_a_folder(tmp_path):
    numbered(tmp_path, 2, "folder/data/train-00000-of-00001.jsonl")
    numbered(tmp_path, 2, "folder/data/test-00000-of-00001.jsonl")
    assert len(load_rows(["folder"])[0]) == 2
    assert [path.name[:5] for path in data_files(tmp_path / "folder", "x")] == ["train"]


def test_a_changed_file_is_read_anew(tmp_path):
    path = numbered(tmp_path, 2)
    assert len(load_rows([path])[0]) == 2
    numbered(tmp_path, 3)
    assert len(load_rows([path])[0]) == 3


@pytest.mark.parametrize("cached", [True, False])
def test_the_cache_is_used_when_allowed(tmp_path, monkeypatch, cached):
    path = numbered(tmp_path, 2)
    load_rows([path])

    def fail(*_):
        raise AssertionError("read again")

    monkeypatch.setattr("swiftmeg.data.sources.subset_reader.read_raw", fail)
    if cached:
        assert len(load_rows([path])[0]) == 2
    else:
        with pytest.raises(AssertionError, match="read again"):
            load_rows([path], load_from_cache_file=False)


def test_without_the_cache(tmp_path):
    path = numbered(tmp_path, 2)
    assert numbers(load_rows([path], load_from_cache_file=False, dataset_shuffle=False)[0]) == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n\n{"text": \n',
            r"--strict true: a.jsonl:3: not JSON \(Expecting",
        ),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a.jsonl:2: not a JSON object \(list"),
        ("a.json", '[{"text": "x"},\n {"text" 3}]', "a.json line 2: is not JSON"),
        ("a.json", '[{"text": "x"}] 3', "a.json line 1: is not JSON .Extra data"),
        ("a.json", '[{"text": "x"}', "a.json line 1: is not JSON .Expecting ','"),
        ("a.json", b'["\xff"]', "a.json: is not UTF-8 .*convert the file"),
        ("a.json", '[{"text": "x"}, 3]', r"a.json:2: not a JSON object \(int"),
        ("a.json", '[{"text": "x"}, {"a": {"b": 1, "b": 2}}]', "a.json:2: a key is given twice .b"),
        ("a.csv", "text\nx\nx,y\n", "a.csv:3: more fields than the header .quote"),
        ("a.csv", b"text\nx\n\xff\n", "a.csv:3: not UTF-8"),
        ("a.csv", '"' + "x" * (2**25 + 1), "a.csv: is not CSV .field larger than field limit"),
        ("a.txt", b"x\n\xff\xfe", "a.txt:2: not UTF-8 .byte 0xff at 0"),
        ("a.parquet", "x", "a.parquet: cannot be read"),
        (
            "a.xlsx",
            "x",
            r"--dataset a.xlsx: unknown extension .xlsx; accepted: .jsonl, .json, .csv",
        ),
        ("a.jsonl", "", "--dataset a.jsonl: empty"),
        ("a.jsonl", "\n\n", "--dataset a.jsonl: empty"),
        ("a.csv", "text\n", "--dataset a.csv: empty"),
        ("a.jsonl", '{"x": 1}', r"a.jsonl:1: no known column \(the columns are x"),
    ],
)
@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_files(tmp_path, name, content, message, num_proc):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    refuses(message, [name], dataset_num_proc=num_proc, strict=True)


def test_bad_rows_are_dropped_and_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(
        tmp_path / "a.jsonl",
        [
            {"text": "x"},
            {"query": "q", "response": None},
            {"text": 3},
            {"query": None, "text": "a"},
        ],
    )
    for _ in range(2):  # the account is kept with the rows
        assert len(load_rows(["a.jsonl"])[0]) == 1
        assert "a.jsonl: 4 rows read, 1 kept, 3 dropped: " in caplog.text
        assert "1 x response is not text (first: a.jsonl:3, int)" in caplog.text
        caplog.clear()
    refuses("--strict true: .*a.jsonl: unusable rows: .*a.jsonl:2", ["a.jsonl"], strict=True)
    refuses(
        r"^--strict true: a.jsonl:2: the response is empty$",
        *(["a.jsonl"],),
        strict=True,
        load_from_cache_file=False,
    )


def test_no_row_can_be_used(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\nx\n')
    refuses(
        "none of its 2 rows can be used: 1 x no known column .first: a.jsonl:1, the columns are x.",
        ["a.jsonl"],
    )


def test_bad_text_in_parquet(tmp_path):
    bad = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    assert answers(load_rows(["a.parquet"], dataset_shuffle=False)[0]) == ["a", "c"]
    refuses("--strict true: .*a.parquet:2, byte 0xff", ["a.parquet"], strict=True)


def test_arrays_are_read_row_by_row(tmp_path):
    rows = [{"text": "x [1, 2] ]"}, {"text": "y"}]
    (tmp_path / "a.json").write_text("\ufeff \n" + json.dumps(rows, indent=1) + "\n ")
    assert answers(load_rows(["a.json"], dataset_shuffle=False)[0]) == ["x [1, 2] ]", "y"]
    (tmp_path / "b.json").write_text("[ ]")
    refuses("--dataset b.json: empty", ["b.json"])


def test_columns_are_renamed_first(tmp_path):
    write(tmp_path / "a.jsonl", [{"q1": "x", "a1": "y", "text": "z"}])
    loaded, _ = load_rows(["a.jsonl"], columns={"q1": "query", "a1": "response"})
    assert [message["content"] for message in loaded[0]["messages"]] == ["x", "y"]
    assert answers(load_rows(["a.jsonl"])[0]) == ["z"]  # not what the cache holds


# The syntax.


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.jsonl", "there is no file or folder missing.jsonl, .*registered: self-cognition"),
        ("dir/missing.jsonl", "there is no file or folder dir/missing.jsonl"),
        ("./a/b", "there is no file or folder ./a/b"),
        ("nothing", "there is no file or folder nothing"),
        ("self-cognition#many", "#many is not a positive whole number of rows; accepted: "),
        ("self-cognition#0", "#0 is not a positive whole number"),
        ("self-cognition#-3", "#-3 is not a positive whole number"),
        ("swift/self-cognition:big", "unknown subset big; accepted: default, qwen3, empty_think"),
        ("some/data:all", "the subsets of some/data are not registered: name them"),
    ],
)
def test_bad_specs(spec, message):
    refuses(message, [spec])


def test_an_existing_path_is_taken_literally(tmp_path):
    numbered(tmp_path, 3, "odd:name#2.jsonl")
    assert len(load_rows(["odd:name#2.jsonl"])[0]) == 3
    assert len(load_rows(["odd:name#2.jsonl#2"])[0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split_dataset_ratio": 1.0},
            "--split_dataset_ratio 1.0: accepted: from 0 to less than 1",
        ),
        ({"interleave_prob": [0.5, 0.5]}, "--interleave_prob 0.5 0.5: 2 values for 1 datasets"),
        ({"interleave_prob": [0.9]}, "--interleave_prob 0.9: must be positive and sum up to 1"),
        ({"stopping_strategy": "x"}, "--stopping_strategy x: unknown; accepted: first_exhausted"),
        ({"download_mode": "x"}, "--download_mode x: unknown; accepted: reuse_dataset_if_exists"),
    ],
)
def test_bad_options(options, message):
    refuses(message, ["self-cognition"], **options)
    refuses("--dataset: give at least one dataset", [])


# Splitting, sampling, mixing.


def test_sampling(tmp_path):
    path = numbered(tmp_path, 10)
    fewer = numbers(load_rows([path + "#4"], dataset_shuffle=False)[0])
    assert len(set(fewer)) == 4
    counts = collections.Counter(numbers(load_rows([path + "#23"])[0]))
    assert sorted(counts.values()) == [2] * 7 + [3] * 3
    assert fewer == numbers(load_rows([path + "#4"], dataset_shuffle=False)[0])
    assert fewer != numbers(load_rows([path + "#4"], dataset_shuffle=False, data_seed=1)[0])


@pytest.mark.parametrize(
    ("sample", "ratio", "train", "val"),
    [("", 0.1, 90, 10), ("", 0.001, 99, 1), ("#50", 0.1, 45, 5), ("#250", 0.1, 240, 10)],
)
def test_splitting(tmp_path, sample, ratio, train, val):
    path = numbered(tmp_path, 100)
    train_rows, val_rows = load_rows([path + sample], split_dataset_ratio=ratio)
    assert (len(train_rows), len(val_rows)) == (train, val)
    assert not set(numbers(train_rows)) & set(numbers(val_rows))
    assert len(set(numbers(val_rows))) == val


def test_a_dataset_too_small_to_split(tmp_path):
    refuses("1 row.* cannot be split", [numbered(tmp_path, 1)], split_dataset_ratio=0.5)


def test_shuffling_depends_on_the_seed(tmp_path):
    specs = [numbered(tmp_path, 20, "a.jsonl"), numbered(tmp_path, 20, "b.jsonl", start=20)]
    assert numbers(load_rows(specs, dataset_shuffle=False)[0]) == list(range(40))
    first, again = numbers(load_rows(specs)[0]), numbers(load_rows(specs)[0])
    assert first == again != list(range(40))
    assert sorted(first) == list(range(40))
    assert numbers(load_rows(specs, data_seed=1)[0]) != first


def test_interleaving(tmp_path):
    specs = [numbered(tmp_path, 50, "a.jsonl"), numbered(tmp_path, 500, "b.jsonl", start=100)]
    options = {"interleave_prob": [0.5, 0.5], "dataset_shuffle": False}
    first = numbers(load_rows(specs, **options)[0])
    assert sum(number < 100 for number in first) == 50
    assert 20 < sum(number >= 100 for number in first) < 100
    every = numbers(load_rows(specs, stopping_strategy="all_exhausted", **options)[0])
    assert set(every) >= set(range(100, 600))


# Names and hubs.


def test_the_shipped_self_cognition_set(tmp_path):
    names = {"model_name": ["小鱼", "Fish"], "model_author": ["海", "Sea"]}
    loaded, _ = load_rows(["self-cognition"], strict=True, **names)
    path = registry.find_dataset("self-cognition").path
    by_path, _ = load_rows([f"{path}#20"], **names)
    assert len(by_path) == 20
    text = " ".join(message["content"] for row in loaded["messages"] for message in row)
    assert "{{" not in text
    assert all(word in text for word in ("小鱼", "Fish", "海", "Sea"))
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    languages = collections.Counter(row["tag"] for row in raw)
    assert languages["en"] > 60
    assert 20 <= languages["zh"] <= 30
    assert len({row["query"] for row in raw}) == len(raw)
    assert all(set(row) == {"query", "response", "tag"} for row in raw)
    assert max(len(row["response"]) for row in raw) < 100
    refuses(r"self_cognition.jsonl:\d+: .*{{NAME}}: give --model_name", ["self-cognition"])
    refuses("give --model_name", [str(path)], model_author=["x"])
    refuses("--model_name a b c: 3 values", ["self-cognition"], model_name=["a", "b", "c"])


@pytest.fixture
def hub_calls(monkeypatch):
    """Stand-ins for both hubs that record their calls and return self-cognition rows."""
    calls = []
    rows = Dataset.from_list([{"query": "who", "response": "{{NAME}} {{AUTHOR}}", "tag": "en"}])

    def huggingface(dataset_id, subset, split, token, mode, streaming):
        calls.append(("hf", dataset_id, subset, split, token, mode))
        return rows

    def modelscope(dataset_id, subset, split, token, mode, streaming):
        calls.append(("ms", dataset_id, subset, split, token, mode))
        return rows

    monkeypatch.setattr(hubs, "_from_huggingface", huggingface)
    monkeypatch.setattr(hubs, "_from_modelscope", modelscope)
    return calls


NAMES = {"model_name": ["N"], "model_author": ["A"]}


def test_ids_go_to_the_chosen_hub(hub_calls):
    mode = "reuse_dataset_if_exists"
    for spec, use_hf, expected in [
        ("swift/self-cognition", False, ("ms", "swift/self-cognition", None)),
        ("swift/self-cognition#1", True, ("hf", "modelscope/self-cognition", None)),
        ("hf::modelscope/self-cognition", False, ("hf", "modelscope/self-cognition", None)),
        ("ms::swift/self-cognition", True, ("ms", "swift/self-cognition", None)),
        ("any/data", False, ("ms", "any/data", None)),
        ("hf::any:fr#1", False, ("hf", "any", "fr")),
        ("AI-ModelScope/alpaca-gpt4-data-en", True, ("hf", "vicgalle/alpaca-gpt4", None)),
        ("alpaca-gpt4-data-zh", False, ("ms", "AI-ModelScope/alpaca-gpt4-data-zh", None)),
    ]:
        hub_calls.clear()
        loaded, _ = load_rows([spec], use_hf=use_hf, hub_token="T", **NAMES)
        assert hub_calls == [(*expected, "train", "T", mode)]
        assert answers(loaded) == ["N A"]


def test_subsets(hub_calls):
    def texts(spec):
        loaded, _ = load_rows([spec], dataset_shuffle=False, **NAMES)
        return [[message["content"] for message in row] for row in loaded["messages"]]

    empty = "<think>\n\n</think>\n\n"
    assert texts("swift/self-cognition:qwen3") == [["who /no_think", empty + "N A"]]
    assert texts("swift/self-cognition:empty_think") == [["who", empty + "N A"]]
    assert texts("swift/self-cognition:default/empty_think") == [
        ["who", "N A"],
        ["who", empty + "N A"],
    ]
    assert texts("swift/self-cognition:all") == [["who", "N A"]]
    assert texts("any/data:fr/de") == [["who", "N A"]] * 2
    assert [call[2] for call in hub_calls[-2:]] == ["fr", "de"]


def test_what_the_hub_says_is_passed_on(monkeypatch):
    def fail(*_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hubs, "_from_modelscope", fail)
    refuses(
        r"--dataset any/data: cannot be loaded from ModelScope \(ConnectionError: no route\): .*"
        "--use_hf true",
        ["any/data"],
    )


def test_the_hubs_own_loaders_are_called(monkeypatch):
    rows = Dataset.from_list([{"text": "x"}])
    calls = {}

    class MsDataset:
        @staticmethod
        def load(dataset_id, **options):
            calls["ms"] = (dataset_id, options)
            return MsDataset()

        def to_hf_dataset(self):
            return rows

    mode = "force_redownload"
    modelscope = types.ModuleType("modelscope")
    modelscope.MsDataset = MsDataset
    constant = types.ModuleType("modelscope.utils.constant")
    constant.DownloadMode = str
    monkeypatch.setitem(sys.modules, "modelscope", modelscope)
    monkeypatch.setitem(sys.modules, "modelscope.utils.constant", constant)

    def load_dataset(dataset_id, **options):
        calls["hf"] = (dataset_id, options)
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for spec in ("ms::a/b:s", "hf::a/b:s"):
        loaded, _ = load_rows([spec], download_mode=mode, hub_token="T")
        assert answers(loaded) == ["x"]
    options = {"split": "train", "token": "T", "download_mode": mode}
    assert calls["ms"] == ("a/b", {"subset_name": "s", "use_streaming": False, **options})
    assert calls["hf"] == ("a/b", {"name": "s", "streaming": False, **options})


def test_registering(tmp_path):
    path = numbered(tmp_path, 2, "mine.jsonl")

    def louder(row):
        return {**row, "response": row["response"] + "!"}

    def broken(row):
        return {"text": row["absent"]}

    subsets = {
        "plain": Subset(),
        "loud": Subset(preprocess=louder),
        "odd": Subset(preprocess=broken),
    }
    register_dataset(DatasetInfo(path=tmp_path / "mine.jsonl", subsets=subsets), name="mine")
    assert answers(load_rows(["mine:loud"], dataset_shuffle=False)[0]) == ["0!", "1!"]
    assert answers(load_rows(["mine:plain"], dataset_shuffle=False)[0]) == ["0", "1"]
    refuses("2 x the dataset's preprocessing failed .*KeyError", ["mine:odd"])
    refuses("choose among its subsets plain, loud, odd, such as mine:plain, or :all", ["mine#3"])
    register_dataset(DatasetInfo(hf_id="only/hf", columns={"a": "text"}))
    refuses("is registered for the other hub only: use hf::", ["only/hf"])
    for info, name in [(DatasetInfo(ms_id="only/hf"), None), (DatasetInfo(path=path), None)]:
        with pytest.raises(UserError, match="register_dataset: "):
            register_dataset(info, name=name)


@pytest.mark.parametrize(
    ("sample", "ratio", "said"),
    [
        (7, 0.0, "there are 3 rows for 7: each is taken 2 times, and 1 of them, drawn at random"),
        (6, 0.0, "there are 3 rows for 6: each is taken 2 times"),
        (7, 0.4, "there are 2 rows for 6: each is taken 3 times"),
        (3, 0.0, None),
        (2, 0.0, None),
    ],
)
def test_repeated_rows_are_said(tmp_path, caplog, sample, ratio, said):
    spec = numbered(tmp_path, 3) + f"#{sample}"
    load_rows([spec], split_dataset_ratio=ratio)
    lines = [record.getMessage() for record in caplog.records if "taken" in record.getMessage()]
    assert len(lines) == (said is not None)
    assert all(line.startswith(f"{spec}: {said}") for line in lines)


def test_more_rows_than_can_be_made(tmp_path):
    for number in ("999999999999", "9" * 5000):
        with pytest.raises(UserError) as caught:
            load_rows([numbered(tmp_path, 3) + f"#{number}"])
        assert len(str(caught.value)) < 300
        assert "lower N" in str(caught.value)
