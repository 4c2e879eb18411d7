"""Parameters: the files, overrides as a notebook gives them, and errors that name the key, the place and the mend."""

from __future__ import annotations

import copy
import difflib
import os
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from ttl_utils import params as module
from ttl_utils.errors import ParameterError, TTLError
from ttl_utils.model import count_parameters
from ttl_utils.params import bundled, load_params, sizes
from ttl_utils.schema import PARAMETER_NAMES, SECTIONS

SIZES = ("nano", "40m", "160m", "460m")
RAW = {size: yaml.safe_load((bundled("params") / f"{size}.yaml").read_text(encoding="utf-8")) for size in SIZES}


@pytest.fixture(autouse=True, scope="module")
def fast_yaml():
    """The same YAML by the C parser: each test reads a file or more."""
    with pytest.MonkeyPatch.context() as patch:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        patch.setattr(yaml, "safe_load", lambda text: yaml.load(text, Loader=loader))
        yield


def nested(dotted: str, value: Any) -> dict:
    """`("model.hidden_size", 64)` as `{"model": {"hidden_size": 64}}`."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def notebook(**injected: Any) -> dict:
    """The globals of a notebook after its parameters cell and, as papermill writes it, the injected one."""
    cells = ["", 'size = "nano"\nfile = run = base = seed = None\n']
    cells.append("data, tokenizer, model, pretraining, evaluation, chat, carbon = ({} for _ in range(7))\n")
    if injected:
        cells.append(PythonTranslator.codify(injected, "Parameters"))
    values: dict[str, Any] = {"In": cells, "plt": object(), "get_ipython": None}
    for cell in cells:
        exec(cell, values)
    return values


def message(values: dict) -> str:
    with pytest.raises(ParameterError) as caught:
        load_params(values)
    return str(caught.value)


def write(path: Path, values: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return str(path)


def edited(base: str, /, **changes: Any) -> dict:
    """A size's values with some dotted keys changed (`__` for the dot); None removes the key."""
    values = copy.deepcopy(RAW[base])
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = values
        for key in path:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return values


# the files


def test_the_sizes_are_the_files():
    assert sorted(sizes()) == sorted(SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_loads_and_its_file_names_itself(size):
    params = load_params({"size": size})
    assert params.file == RAW[size]["file"] == f"params/{size}.yaml"
    assert params.size == params.run_name == size
    assert params.notes == ()
    assert params.values.model_dump(exclude_unset=True) == RAW[size]


@pytest.mark.parametrize("size", SIZES)
def test_every_key_has_a_comment(size):
    # a key that repeats (items of a list, kinds of filter) is explained once
    text = (bundled("params") / f"{size}.yaml").read_text(encoding="utf-8")
    lines, explained = text.splitlines(), {}

    def visit(node: yaml.Node, path: str) -> None:
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                visit(item, path)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line
                name = f"{path}.{key.value}"
                here = " # " in lines[line] or lines[line - 1].lstrip().startswith("#")
                explained[name] = explained.get(name, False) or here
                visit(value, f"{path}.*" if path == ".data.filters" else name)

    visit(yaml.compose(text), "")
    assert len(explained) > 100
    assert [name for name, here in explained.items() if not here] == []


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (
            "160m",
            162_417_408,
            {
                "model.hidden_size": 768,
                "model.intermediate_size": 3072,
                "model.num_attention_heads": 12,
                "model.num_key_value_heads": 12,
                "model.num_hidden_layers": 12,
                "pretraining.per_device_train_batch_size": 4,
                "pretraining.max_steps": 458_000,
                "pretraining.learning_rate": 6e-4,
                "pretraining.warmup_steps": 5_000,
                "pretraining.save_steps": 22_000,
            },
        ),
        (
            "460m",
            468_239_360,
            {
                "model.hidden_size": 1024,
                "model.intermediate_size": 4096,
                "model.num_attention_heads": 16,
                "model.num_key_value_heads": 16,
                "model.num_hidden_layers": 24,
                "pretraining.per_device_train_batch_size": 2,
                "pretraining.max_steps": 1_200_000,
                "pretraining.learning_rate": 3e-4,
                "pretraining.warmup_steps": 10_000,
                "pretraining.save_steps": 25_000,
            },
        ),
    ],
)
def test_the_papers_sizes_are_the_papers(size, count, expected):
    params = load_params({"size": size})
    assert count_parameters(params.model, params.tokenizer.vocab_size) == count
    both = {
        "model.max_position_embeddings": 2048,
        "tokenizer.vocab_size": 32_000,
        "pretraining.tokens_per_step": 8_192,
        "pretraining.adam_beta1": 0.9,
        "pretraining.adam_beta2": 0.999,
        "pretraining.adam_epsilon": 1e-8,
        "pretraining.weight_decay": 0.01,
        "pretraining.lr_scheduler_type": "cosine",
        "pretraining.eval_steps": 100_000,
        "pretraining.max_grad_norm": None,
        "evaluation.downstream_epochs": 3,
        "evaluation.downstream_batch_size": 16,
        "evaluation.downstream_learning_rate": 4e-5,
        "chat.num_train_epochs": 3,
        "chat.learning_rate": 1e-5,
        "chat.warmup_steps": 1_000,
        "carbon.carbon_intensity_g_per_kwh": 365.477,
    }
    flat = params.flat()
    assert {key: flat[key] for key in (*expected, *both)} == {**expected, **both}


# overrides


def test_without_parameters_a_notebook_is_nano():
    for given_values in ({}, notebook()):
        params = load_params(given_values)
        assert params.size == "nano"
        assert set(params.origins.values()) == {"params/nano.yaml", "default"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("file", [False, True])
def test_a_notebook_overrides_one_key(size, file):
    # with a file, papermill's -f: every section whole, and -y replaces one of them
    injected = {**(RAW[size] if file else {"size": size}), "pretraining": {"max_steps": 50}}
    params, plain = load_params(notebook(**injected)), load_params({"size": size})
    assert params.notes == ()
    assert params.flat() == {**plain.flat(), "pretraining.max_steps": 50}
    assert {key for key, origin in params.origins.items() if origin == "given"} == {"pretraining.max_steps"}


def test_overrides_reach_every_depth_and_leave_the_neighbours():
    given_values = {
        "seed": 7,
        "data": {"filters": {"prose": {"min_words": 9}}},
        "evaluation": {"harness": []},
        "pretraining": {"eval_tokens": 4096},
    }
    params, plain = load_params(given_values), load_params({})
    changed = {key for key, value in params.flat().items() if value != plain.flat()[key]}
    assert changed == {"seed", "data.filters.prose.min_words", "evaluation.harness", "pretraining.eval_tokens"}
    assert {key for key, origin in params.origins.items() if origin == "given"} == changed


def test_a_key_can_be_set_to_null():
    params = load_params({"size": "40m", "pretraining": {"eval_tokens": None}})
    assert RAW["40m"]["pretraining"]["eval_tokens"] and params.pretraining.eval_tokens is None
    assert params.origins["pretraining.eval_tokens"] == "given"


def test_a_repeated_value_keeps_its_origin():
    params = load_params({"pretraining": dict(RAW["nano"]["pretraining"])})
    assert "given" not in params.origins.values()


@pytest.mark.parametrize("size", SIZES)
def test_every_leaf_has_an_origin(size):
    params = load_params(notebook(size=size, chat={"top_k": 3}))
    assert set(params.flat()) == set(params.origins)
    assert params.origins["chat.top_k"] == "given"
    assert params.origins["chat.top_p"] == f"params/{size}.yaml"


def test_flat_names_every_leaf():
    params = load_params({})
    flat = params.flat()
    assert flat["model.hidden_size"] == params.model.hidden_size
    assert flat["data.filters.prose.min_words"] == params.data.filters["prose"].min_words
    assert [source["name"] for source in flat["data.sources"]] == [source.name for source in params.data.sources]
    assert not any(isinstance(value, dict) for value in flat.values())


def test_parameters_do_not_change_after_loading():
    params = load_params({})
    for place, name in ((params.model, "hidden_size"), (params.values, "seed"), (params, "notes")):
        with pytest.raises(Exception, match=r"frozen|assign"):
            setattr(place, name, 1)


# unknown names


def test_papermill_injects_a_cell_that_is_recognised():
    assert any(cell.startswith("# Parameters") for cell in notebook(seed=1)["In"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pretrainig", "'pretraining'"),
        ("sise", "'size'"),
        ("max_steps", "pretraining: {max_steps: ...}"),
        ("country_iso_code", "carbon: {country_iso_code: ...}"),
        ("zzzzzzzz", "known: size, file"),
    ],
)
def test_an_unknown_injected_name_is_refused(name, hint):
    for values in (notebook(**{name: 5}), {name: 5}):
        text = message(values)
        assert text.startswith(f"{name}: there is no such key") and hint in text


def test_a_notebooks_other_variables_are_no_parameters():
    values = {**notebook(seed=3), "pretrainig": 1, "max_steps": 2}
    assert load_params(values).seed == 3


def test_a_corrected_cell_counts_and_a_broken_one_does_not():
    wrong, right = "# Parameters\nsise = 'nano'\n", "# Parameters\nsize = 'nano'\n"
    assert "sise" in message({**notebook(), "In": ["", wrong]})
    assert load_params({**notebook(), "In": ["", wrong, right]}).size == "nano"
    assert load_params({**notebook(), "In": ["", "# Parameters\nsize = 'nano\n"]}).size == "nano"


def key_places(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every key of the schema in a tree; the names of filters are the user's."""
    if isinstance(tree, list):
        return [place for number, item in enumerate(tree) for place in key_places(item, (*path, number))]
    if not isinstance(tree, dict):
        return []
    own = [] if path == ("data", "filters") else [(*path, key) for key in tree]
    return own + [place for key, value in tree.items() for place in key_places(value, (*path, key))]


@st.composite
def typos(draw: st.DrawFn, size: str, places: list[tuple]) -> tuple[tuple, str]:
    """A key's place, and its name with one character added, removed or replaced."""
    *path, key = draw(st.sampled_from(places))
    character = draw(st.sampled_from(string.ascii_lowercase + string.digits + "_"))
    start = draw(st.integers(0, len(key) - 1))
    end = start + draw(st.integers(0, 1))
    wrong = key[:start] + (character if start == end or draw(st.booleans()) else "") + key[end:]
    tree = RAW[size]
    for step in path:
        tree = tree[step]
    schema = module._model_at((*path, key)).model_fields
    return (*path, key), wrong if wrong not in schema else f"{key}_"


def nearness(name: str, wrong: str) -> float:
    return difflib.SequenceMatcher(None, name, wrong).ratio()


def named_nearest(text: str, place: tuple, wrong: str) -> bool:
    dotted = ".".join(map(str, (*place[:-1], wrong)))
    line = next((line for line in text.splitlines() if line.startswith(f"{dotted}: ")), "")
    found = re.search(r"did you mean '(\w+)'\?", line)
    # another key may be as near: adam_beta
    return bool(found) and nearness(found[1], wrong) >= nearness(place[-1], wrong)


SECTION_PLACES = {
    section: [place for place in key_places(RAW["nano"]) if place[0] == section and not set(place) & set(range(9))]
    for section in SECTIONS
}


@pytest.mark.parametrize("section", SECTIONS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_typo_in_an_override_names_the_nearest_key(section, data):
    inner = [place for place in SECTION_PLACES[section] if len(place) > 1]
    place, wrong = data.draw(typos("nano", inner))
    text = message(notebook(**nested(".".join((*place[:-1], wrong)), 1)))
    assert named_nearest(text, place, wrong), text
    assert "(as given)" in text


@settings(max_examples=25, deadline=None)
@given(typo=typos("160m", key_places(RAW["160m"])))
def test_a_typo_in_a_file_names_the_nearest_key_and_the_file(typo):
    place, wrong = typo
    values = copy.deepcopy(RAW["160m"])
    *path, key = place
    tree = values
    for step in path:
        tree = tree[step]
    tree[wrong] = tree.pop(key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_file", lambda file: copy.deepcopy(values))
        text = message({"file": "mine.yaml"})
    assert named_nearest(text, place, wrong), text
    assert "in mine.yaml" in text


def test_every_mistake_is_named_at_once():
    text = message({"model": {"hiden_size": 1}, "chat": {"top_k": "5"}, "seed": 1.5})
    assert [line.split(":")[0] for line in text.splitlines()] == ["seed", "model.hiden_size", "chat.top_k"]


# types


@pytest.mark.parametrize(
    ("dotted", "value", "part"),
    [
        ("pretraining.max_steps", 50.0, "integer"),
        ("pretraining.max_steps", True, "integer"),
        ("pretraining.max_steps", 0, "greater than 0"),
        ("pretraining.max_steps", None, "integer"),
        ("pretraining.learning_rate", True, "number"),
        ("pretraining.learning_rate", 0.0, "greater than 0"),
        ("pretraining.learning_rate", float("inf"), "finite"),
        ("pretraining.adam_epsilon", float("nan"), "finite"),
        ("pretraining.lr_scheduler_type", "cosin", "'cosine', 'linear'"),
        ("pretraining.lr_scheduler_type", "1", "'cosine', 'linear'"),
        ("pretraining.compile", "1", "boolean"),
        ("pretraining.compile", 1, "boolean"),
        ("pretraining.prompts", "Olá", "list"),
        ("pretraining.device", "gpu", "'cuda'"),
        ("chat.top_p", 1.5, "less than or equal to 1"),
        ("data.test_share", -0.1, "greater than or equal to 0"),
        ("data.sources", [], "at least 1"),
        ("tokenizer.vocab_size", 65537, "65536"),
        ("tokenizer.vocab_size", [4096], "integer"),
        ("model", {"hidden_size": {"a": 1}}, "integer"),
        ("carbon.country_iso_code", "DE", "3 characters"),
        ("carbon.pue", 0.5, "greater than or equal to 1"),
        ("seed", 1.5, "integer"),
    ],
)
def test_a_wrong_type_or_range_names_the_key(dotted, value, part):
    text = message(nested(dotted, value))
    key = "model.hidden_size" if dotted == "model" else dotted
    assert text.startswith(f"{key}: ") and "(as given)" in text and part in text, text
    assert "not a number" not in text


@pytest.mark.parametrize("value", [5, "x", [1]])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_keys_and_values(section, value):
    assert message({section: value}) == f"{section}: expected keys and values, got {value!r}"


@pytest.mark.parametrize(
    ("dotted", "text", "advice"),
    [
        ("pretraining.learning_rate", "6e-4", "0.0006"),
        ("pretraining.adam_epsilon", "1e-8", "1.0e-08"),
        ("pretraining.adam_epsilon", "1e-12", "1.0e-12"),
        ("pretraining.max_steps", "1e6", "1000000"),
        ("pretraining.max_steps", "50", "50"),
        ("chat.top_p", " .5 ", "0.5"),
        ("seed", "42", "42"),
        ("model.rope_theta", "1_000_000", "1000000"),
    ],
)
def test_a_number_as_text_says_what_to_write(dotted, text, advice):
    # papermill's YAML gives 6e-4 as text
    said = message(notebook(**nested(dotted, text)))
    assert said.startswith(f"{dotted}: {text!r} (as given)") and f"write {advice} without quotes" in said
    value = yaml.safe_load(advice)
    assert load_params(nested(dotted, value)).flat()[dotted] == float(text)


@settings(max_examples=300)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_number_to_write_is_that_number_in_yaml(number):
    written = yaml.safe_load(module._yaml_number(str(number)))
    assert isinstance(written, int | float) and written == number


def test_words_and_infinities_get_no_advice_on_numbers():
    for text in ("nan", "inf", "fast", ""):
        assert "without quotes" not in message(nested("pretraining.learning_rate", text))


def test_numbers_as_text_in_a_copy_name_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    write(path, edited("nano", file=str(path)))
    path.write_text(re.sub(r"learning_rate: 0.003", "learning_rate: 3e-3", path.read_text()))
    said = message({"file": str(path)})
    assert said.startswith(f"pretraining.learning_rate: '3e-3' (in {path})") and "write 0.003 " in said


# combinations


DOWNSTREAM = {"name": "mine", "text": "{text}", "label": "label", "max_length": 64}
WHEEL = {"package": "p", "version": "1", "sha256": "0", "reader": "r"}
SOURCE = {"name": "mine", "use": "corpus", "kind": "plain", "filter": "prose", "licence": "CC0"}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"model": {"num_attention_heads": 3}}, ["model: num_attention_heads 3", "hidden_size 128"]),
        *(
            ({"chat": {"user_open": mark}}, [f"chat: user_open {mark!r}", "give a mark such as <instruction>"])
            for mark in ("", " ", "<s>", "</s>", "{{ x }}'", 'a"', "a\\")
        ),
        ({"chat": {"user_close": "<unk>"}}, ["chat: user_close '<unk>'"]),
        ({"chat": {"user_open": "<a>", "user_close": "<a>"}}, ["user_open and user_close are both '<a>'"]),
        ({"chat": {"max_new_tokens": 253}}, ["chat.max_new_tokens 253", "max_position_embeddings 256: at most 252"]),
        ({"model": {"num_key_value_heads": 3}}, ["model: num_key_value_heads 3", "num_attention_heads 4"]),
        ({"model": {"num_attention_heads": 128, "num_key_value_heads": 1}}, ["model: ", "must be even"]),
        (
            {"pretraining": {"tokens_per_step": 2047}},
            ["pretraining.tokens_per_step 2047", "8 x 256 = 2048", "pretraining.tokens_per_step as given"],
        ),
        ({"pretraining": {"per_device_train_batch_size": 3}}, ["(3 x 256 = 768)"]),
        ({"chat": {"tokens_per_step": 256}}, ["chat.tokens_per_step 256", "2 x 256"]),
        ({"model": {"max_position_embeddings": 64}}, ["'trust': max_length 128", "max_position_embeddings 64"]),
        ({"evaluation": {"inference": {"prompt_tokens": 250}}}, ["prompt_tokens 250", "new_tokens 32", "256"]),
        ({"evaluation": {"downstream": [{**DOWNSTREAM, "source": "nope"}]}}, ["'mine'", "is named 'nope'"]),
        # a source of another use is not to be classified
        ({"evaluation": {"downstream": [{**DOWNSTREAM, "source": "petrogold"}]}}, ["'mine'", "'petrogold'"]),
        ({"evaluation": {"downstream": [DOWNSTREAM]}}, ["'mine'", "either source", "or dataset"]),
        (
            {"evaluation": {"downstream": [{**DOWNSTREAM, "source": "dantestocks-trust", "dataset": "a/b"}]}},
            ["either source"],
        ),
        ({"evaluation": {"downstream": [{**DOWNSTREAM, "dataset": "a/b"}]}}, ["train_split and test_split"]),
        ({"data": {"sources": [SOURCE]}}, ["data.sources.0: source 'mine'", "either package"]),
        ({"data": {"sources": [{**SOURCE, **WHEEL, "reader": None}]}}, ["'mine'", "either package"]),
        ({"data": {"sources": [{**SOURCE, **WHEEL, "dataset": "a/b"}]}}, ["'mine'", "either package"]),
        ({"data": {"sources": [{**SOURCE, "dataset": "a/b", "split": "train"}]}}, ["'mine'", "column"]),
        ({"data": {"sources": [{**SOURCE, **WHEEL, "filter": "pros"}]}}, ["'mine'", "'pros'", "prose, social"]),
        ({"data": {"sources": [{**SOURCE, **WHEEL}] * 2}}, ["data: two sources have the same name"]),
    ],
)
def test_an_impossible_combination_says_which(values, parts):
    text = message(notebook(**values))
    assert all(part in text for part in parts), text
    assert "given" in text.splitlines()[-1]


def test_a_combination_of_a_file_names_the_file(tmp_path):
    file = write(tmp_path / "mine.yaml", edited("nano", file=None, model__num_attention_heads=3))
    text = message({"file": file})
    assert text.endswith(f"(in {file})") and "given" not in text


def test_a_run_may_be_cut_below_its_warm_up():
    assert load_params({"size": "460m", "pretraining": {"max_steps": 2}}).pretraining.max_steps == 2


@pytest.mark.parametrize("name", ["a/b", "../a", "..", ".", ".hidden", "/tmp", "a/", ""])
@pytest.mark.parametrize("key", ["run", "base"])
def test_a_run_is_named_by_a_plain_folder_name(key, name):
    text = message(notebook(**{key: name}))
    assert f"{key} {name!r} is not a plain folder name" in text and f"{key} as given" in text


def test_a_copys_size_is_a_plain_folder_name(tmp_path):
    file = write(tmp_path / "mine.yaml", edited("nano", file=None, size="../mine"))
    assert "size '../mine' is not a plain folder name" in message({"file": file})


@pytest.mark.parametrize("name", ["160m-lr3e-4", "meu teste", "ação", "v1.5"])
def test_other_names_are_fine(name):
    params = load_params(notebook(run=name, base=name))
    assert params.run_name == params.base == name


# files


def test_an_unknown_size_names_the_nearest():
    text = message(notebook(size="nanno"))
    assert text.startswith("size: there is no size 'nanno'") and "'nano'?" in text and "460m" in text


@pytest.mark.parametrize("size", [160, True, ["nano"]])
def test_a_size_is_a_text(size):
    assert message({"size": size}).startswith("size: ")


def test_a_size_and_the_file_of_another_conflict():
    text = message(notebook(size="460m", file="params/160m.yaml"))
    assert text.startswith("size: '460m'") and "'params/160m.yaml' is of size '160m'" in text


def test_a_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = message({"file": "params/none.yaml"})
    assert str(tmp_path / "params/none.yaml") in text and str(bundled("params") / "none.yaml") in text
    assert message({"file": str(tmp_path)}).startswith("file: ")
    assert message({"file": 5}) == "file: 5 is not a path"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"data: [1, 2", "not readable as YAML"),
        (b"size: nano\n\tseed: 1\n", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"", "expected keys and values, found NoneType"),
        (b"- 1\n- 2\n", "expected keys and values, found list"),
        (b"size: nano\nmodel: 5\n", "model: expected keys and values"),
        (b"size: nano\nmodel:\n", "model: expected keys and values"),
        (b"size: mine\n", "tokenizer: missing (in "),
    ],
)
def test_a_file_that_is_no_parameter_file_is_refused(tmp_path, content, part):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    for override in ({}, {"model": {"hidden_size": 64}}):
        text = message({"file": str(path), **override})
        assert part in text and str(path) in text


def test_a_file_without_a_key_names_the_key(tmp_path):
    file = write(tmp_path / "mine.yaml", edited("nano", chat__top_k=None, model__rope_theta=None, size="mine"))
    assert message({"file": file}).splitlines() == [
        f"model.rope_theta: missing (in {file})",
        f"chat.top_k: missing (in {file})",
    ]


def test_a_file_of_a_few_keys_takes_the_others_from_its_size(tmp_path):
    few = {"size": "nano", "run": "other", "data": {"language": "gl"}, "evaluation": {"generation": None}}
    path = write(tmp_path / "few.yaml", few)
    plain = load_params({"size": "nano"}).flat()
    named = {"size", "run", "file", "data.language"}
    # as `ttl run few.yaml` gives it, and as papermill injects it from `-f few.yaml`, whether it names itself or not
    for values in ({"file": path, "size": "nano"}, notebook(**few), notebook(**few, file=path)):
        params = load_params(values)
        flat = params.flat()
        assert params.run_name == "other" and params.data.language == "gl" and params.evaluation.generation is None
        changed = {key for key in plain if key not in flat or flat[key] != plain[key]} - named
        assert changed and all(key.startswith("evaluation.generation") for key in changed)
    params = load_params({"file": path})
    assert params.origins["data.language"] == path and params.origins["chat.top_k"] == "params/nano.yaml"


def test_a_rule_that_a_copys_filter_leaves_out_is_off(tmp_path):
    values = edited("nano", data__filters__prose__min_words=None)
    assert load_params({"file": write(tmp_path / "mine.yaml", values)}).data.filters["prose"].min_words == 0
    assert load_params({"size": "nano"}).data.filters["prose"].min_words > 0


@pytest.mark.parametrize("folder", ["notebooks", "elsewhere"])
def test_files_are_found_from_any_working_folder(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(bundled("notebooks") if folder == "notebooks" else tmp_path / folder)
    assert load_params({"size": "160m"}).size == "160m"
    params = load_params(notebook(**RAW["160m"]))
    assert params.size == "160m" and params.notes == ()


def test_a_relative_copy_is_found_from_the_working_folder(tmp_path, monkeypatch):
    write(tmp_path / "mine.yaml", edited("nano", file="mine.yaml", seed=5))
    monkeypatch.chdir(tmp_path)
    assert load_params({"file": "mine.yaml"}).seed == 5
    monkeypatch.chdir(os.sep)
    assert "mine.yaml" in message({"file": "mine.yaml"})


# copies


@pytest.fixture
def own_copy(tmp_path) -> dict:
    path = tmp_path / "mine.yaml"
    values = edited("160m", file=str(path), size="mine", pretraining__learning_rate=1e-3, model__num_hidden_layers=6)
    write(path, values)
    return values


def test_a_copy_that_names_itself_works_as_a_file(own_copy):
    for given_values in ({"file": own_copy["file"]}, notebook(**own_copy)):
        params = load_params(given_values)
        assert params.notes == () and params.run_name == "mine"
        assert params.pretraining.learning_rate == 1e-3 and params.model.num_hidden_layers == 6
        assert set(params.origins.values()) == {own_copy["file"], "default"}


def test_an_override_of_a_copy_keeps_the_copys_other_keys(own_copy):
    params = load_params(notebook(**{**own_copy, "pretraining": {"max_steps": 50}}))
    assert params.notes == ()
    assert (params.pretraining.max_steps, params.pretraining.learning_rate) == (50, 1e-3)
    assert [key for key, origin in params.origins.items() if origin == "given"] == ["pretraining.max_steps"]


def test_a_copy_that_names_another_file_is_told_so():
    values = edited("160m", pretraining__learning_rate=1e-3, model__num_hidden_layers=6)
    params = load_params(notebook(**values))
    (note,) = params.notes
    assert note.startswith("note: model, pretraining came from a file that is not 'params/160m.yaml'")
    assert "set `file`" in note
    # what it says still counts
    assert params.pretraining.learning_rate == 1e-3 and params.origins["pretraining.learning_rate"] == "given"


def test_an_override_of_a_copy_that_names_another_file_is_refused():
    values = edited("160m", model__num_hidden_layers=6)
    text = message(notebook(**{**values, "pretraining": {"max_steps": 50}}))
    assert text.startswith("model came from a file that is not 'params/160m.yaml', and pretraining from an override")
    assert "set `file` in your copy" in text


def test_a_copy_read_by_its_path_is_that_file_whatever_it_names(tmp_path):
    file = write(tmp_path / "mine.yaml", edited("160m", seed=5))
    params = load_params({"file": file, "model": {"num_hidden_layers": 3}})
    assert (params.file, params.seed, params.notes) == (file, 5, ())


def test_errors_are_shown_without_a_traceback():
    with pytest.raises(TTLError) as caught:
        load_params({"sise": 1})
    assert caught.value._render_traceback_() == [f"ParameterError: {caught.value}"]


def test_the_parameter_names_are_the_schemas():
    assert set(PARAMETER_NAMES) == set(module.Parameters.model_fields)
