"""Files of --custom_dataset_info: what they register, and what is wrong with them."""

import json

import pytest
from datasets import Dataset

from swiftmeg.data.sources import hubs, registry
from swiftmeg.data.sources.dataset_info import register_files
from swiftmeg.data.sources.load import load_rows
from swiftmeg.data.stream.stream import RowStream
from swiftmeg.errors import UserError


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_by_name", dict(registry._by_name))


def write_rows(path, *answers, keys=("frage", "antwort")):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(keys, ("q", answer), strict=True)) for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def register(folder, *entries, name="info.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(entries))
    register_files([str(folder / name)])


def answers(*specs, **options):
    rows, _ = load_rows(list(specs), dataset_shuffle=False, **options)
    return [messages[-1]["content"] for messages in rows["messages"]]


COLUMNS = {"frage": "query", "antwort": "response"}


def test_paths_start_at_the_files_folder(tmp_path):
    write_rows(tmp_path / "conf" / "sub" / "rows.jsonl", "1", "2")
    write_rows(tmp_path / "abs.jsonl", "3")
    register(
        tmp_path / "conf",
        {"dataset_path": "sub/rows.jsonl", "dataset_name": "mine", "columns": COLUMNS},
        {"dataset_path": str(tmp_path / "abs.jsonl"), "columns": COLUMNS, "tags": ["a"]},
    )
    assert answers("mine") == ["1", "2"]
    assert answers("mine#1", "abs.jsonl")[-1] == "3"
    assert answers("conf/sub/rows.jsonl", "./abs.jsonl") == ["1", "2", "3"]
    stream = RowStream(["mine", "abs.jsonl"], shuffle_buffer_size=0)
    rows = [stream.standard(row) for row in stream.epoch(0)]
    assert [row["messages"][-1]["content"] for row in rows] == ["1", "2", "3"]
    # Another file of the same name is not this dataset.
    write_rows(tmp_path / "other" / "abs.jsonl", "4")
    with pytest.raises(UserError, match="no known column"):
        load_rows(["other/abs.jsonl"])
    # The command line's columns win.
    assert answers("mine", columns={"frage": "response", "antwort": "query"}) == ["q", "q"]


def test_subsets_of_a_folder_have_columns_of_their_own(tmp_path):
    write_rows(tmp_path / "set" / "de" / "a.jsonl", "eins")
    write_rows(tmp_path / "set" / "en" / "a.jsonl", "one", keys=("ask", "say"))
    english = {"name": "english", "subset": "en", "columns": {"ask": "query", "say": "response"}}
    register(
        tmp_path,
        {
            "dataset_path": "set",
            "dataset_name": "both",
            "subsets": ["de", {**english, "is_weak_subset": True}],
            "columns": COLUMNS,
        },
    )
    assert answers("both:de") == ["eins"]
    assert answers("both:english") == ["one"]
    assert answers("set:de/english") == ["eins", "one"]
    assert answers("both:all") == ["eins"]
    with pytest.raises(UserError, match="choose among its subsets de, english"):
        load_rows(["both"])


def test_hub_ids_with_subsets_and_splits(tmp_path, monkeypatch):
    calls = []

    def load(hub):
        def call(dataset_id, subset, split, *_):
            calls.append((hub, dataset_id, subset, split))
            return Dataset.from_list([{"frage": "q", "antwort": split}])

        return call

    monkeypatch.setattr(hubs, "_from_modelscope", load("ms"))
    monkeypatch.setattr(hubs, "_from_huggingface", load("hf"))
    register(
        tmp_path,
        {
            "ms_dataset_id": "me/poems",
            "hf_dataset_id": "me-hf/poems-hf",
            "dataset_name": "verse",
            "subsets": ["default", "v1"],
            "split": ["train", "validation"],
            "columns": COLUMNS,
            "help": "Poems.",
        },
        {"hf_dataset_id": "me/prose", "split": "test", "columns": COLUMNS},
    )
    for spec, use_hf, expected in [
        ("verse", False, ("ms", "me/poems", None)),
        ("poems:v1", False, ("ms", "me/poems", "v1")),
        ("me-hf/poems-hf", True, ("hf", "me-hf/poems-hf", None)),
    ]:
        calls.clear()
        assert answers(spec, use_hf=use_hf) == ["train", "validation"]
        assert calls == [(*expected, "train"), (*expected, "validation")]
    assert answers("hf::me/prose") == ["test"]


def test_messages_may_be_written_in_another_way(tmp_path):
    said = [("ops", "S"), ("customer", "hi"), ("agent", "yo"), ("user", "and?"), ("agent", "no")]
    dialog = [{"speaker": who, "text": text, "id": 1} for who, text in said]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.jsonl").write_text(json.dumps({"dialog": dialog}) + "\n")
    names = {"role_key": "speaker", "content_key": "text", "user_role": "customer"}
    names |= {"assistant_role": "agent", "system_role": "ops"}
    entry = {"dataset_path": "a", "dataset_name": "mine", "columns": {"dialog": "messages"}}
    register(tmp_path, {**entry, "messages": names})
    rows, _ = load_rows(["mine"])
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert rows["messages"][0] == [
        {"role": role, "content": text} for role, (_, text) in zip(roles, said, strict=True)
    ]
    stream = RowStream(["mine"])
    assert stream.standard(next(stream.epoch(0)))["messages"] == rows["messages"][0]
    # A subset may have names of its own.
    subset = {"subset": "a", "messages": {**names, "user_role": "agent", "assistant_role": "user"}}
    whole = {"dataset_path": ".", "dataset_name": "all-of-it", "columns": {"dialog": "messages"}}
    register(tmp_path, {**whole, "subsets": [subset], "messages": names}, name="other.json")
    with pytest.raises(UserError, match="unknown role"):
        load_rows(["all-of-it:a"])


def test_a_file_may_be_named_twice_but_a_name_taken_once(tmp_path):
    write_rows(tmp_path / "rows.jsonl", "1")
    entry = {"dataset_path": "rows.jsonl", "dataset_name": "mine", "columns": COLUMNS}
    register(tmp_path, entry)
    register(tmp_path, entry, name="same.json")
    with pytest.raises(UserError, match=r"other.json: entry 2: .* mine is already registered"):
        register(tmp_path, entry, {**entry, "columns": {}}, name="other.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", r"is not JSON \(.*line 1 column 3"),
        ('[{"a": 1, "a": 2}]', "a key is given twice"),
        ('{"poems": {"ms_dataset_id": "a/b"}}', "holds an object: accepted: a list"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"ms_dataset_id": "a/b"}, 7]', "entry 2: 7: accepted: an object with ms_dataset_id"),
        ('[{"dataset_id": "a/b"}]', "entry 1: unknown key 'dataset_id': accepted: ms_dataset_id"),
        ('[{"dataset_name": "x"}]', "entry 1: .*give ms_dataset_id, hf_dataset_id or dataset_p"),
        ('[{"dataset_path": "gone.jsonl"}]', "entry 1: dataset_path 'gone.jsonl': there is no"),
        ('[{"dataset_path": "../a.jsonl"}]', "entry 1: dataset_path '../a.jsonl': .* is outside"),
        (
            '[{"dataset_path": ".", "subsets": [{"name": "v", "subset": "a/../../b"}]}]',
            "'a/../../b' is outside of the file",
        ),
        ('[{"dataset_path": 3}]', "entry 1: dataset_path 3: accepted: a string"),
        ('[{"ms_dataset_id": "a/b", "dataset_name": "a:b"}]', "dataset_name 'a:b': must not"),
        ('[{"ms_dataset_id": "a/b", "columns": ["x"]}]', r'entry 1: columns \["x"\]: accepted'),
        ('[{"ms_dataset_id": "a/b", "columns": {"x": 1}}]', "entry 1: columns .*accepted"),
        ('[{"ms_dataset_id": "a/b", "subsets": "v1"}]', 'entry 1: subsets "v1": accepted: a list'),
        ('[{"ms_dataset_id": "a/b", "subsets": [1]}]', "entry 1: subsets: 1: accepted"),
        ('[{"ms_dataset_id": "a/b", "subsets": ["v", "v"]}]', "subsets: v is given twice"),
        ('[{"ms_dataset_id": "a/b", "subsets": ["all"]}]', "subsets: name 'all': cannot"),
        ('[{"ms_dataset_id": "a/b", "subsets": [{"is_weak_subset": 1}]}]', "is_weak_subset 1: "),
        (
            '[{"ms_dataset_id": "a/b", "messages": {"rolekey": "x"}}]',
            "messages .*role_key, content",
        ),
        ('[{"ms_dataset_id": "a/b", "messages": {"role_key": 1}}]', "messages .*accepted: an obj"),
        ('[{"ms_dataset_id": "a/b", "split": []}]', r"entry 1: split \[\]: accepted"),
        ('[{"dataset_path": "info.json", "split": "test"}]', "entry 1: split: a dataset_path has"),
        ('[{"dataset_path": "info.json", "subsets": ["v"]}]', "entry 1: subsets: there is no sub"),
        ('[{"ms_dataset_id": "swift/self-cognition"}]', "entry 1: .* is already registered"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(
        UserError, match=f"^--custom_dataset_info info.json:? .*{message}"
    ) as raised:
        register_files(["info.json"])
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"--custom_dataset_info no.json: cannot be read \(No such"):
        register_files(["no.json"])
