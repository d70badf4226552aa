"""Text: encoding, chat templates and their limits, and text that comes token by token."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from hmad.compute.chat_template import ChatTemplate
from hmad.compute.detokenizer import IncrementalDetokenizer, StopString
from hmad.compute.tokenizer import Tokenizer, byte_of_char
from hmad.facts.errors import ModelError, RequestError

CHECKPOINT = Path(__file__).parent.parent / "scripts" / "checkpoint"
END_ID = 260  # "<|end|>", special, in the tiny tokenizer; 261 is "<think>", not special; 263 and up stand for nothing
NUM_IDS = 265
USER = [{"role": "user", "content": "Hi"}]


def write_tiny_model(path: Path, **config: Any) -> Path:
    """A byte-level tokenizer of all 256 bytes, four merges and three added tokens."""
    vocab = byte_of_char()
    char_of = {byte: char for char, byte in vocab.items()}
    e4, b8, ad = (char_of[byte] for byte in "中".encode())
    merges = [("a", "b"), ("ab", "c"), (e4, b8), (e4 + b8, ad)]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    inner.add_tokens(["<think>", "…added — text"])
    path.mkdir(exist_ok=True)
    inner.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **config}))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def open_model(tmp_path: Path) -> Iterator[Callable[..., Tokenizer]]:
    """Loads a tiny model whose tokenizer_config.json has these entries; closes it afterwards."""
    opened = []

    def open_it(**config: Any) -> Tokenizer:
        opened.append(Tokenizer(write_tiny_model(tmp_path / "model", **config)))
        return opened[-1]

    yield open_it
    for one in opened:
        one.close()


# --- the tokenizer


@given(st.text())
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


def test_special_tokens_are_recognised_and_skipped(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_id == END_ID
    ids = tokenizer.encode("abc<|end|><think>")
    assert ids == [257, END_ID, 261]
    assert tokenizer.decode(ids) == "abc<think>"
    assert [tokenizer.is_special(i) for i in ids] == [False, True, False]


def test_ids_without_a_token_stand_for_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(263) == b""
    assert tokenizer.decode([97, 263, 98]) == "ab"


def test_vocabulary_must_fit_the_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 263
    tokenizer.check_vocab(263)
    with pytest.raises(ModelError, match=r"tokenizer\.json: token ids reach 262, .* vocab_size is 262"):
        tokenizer.check_vocab(262)


def test_half_a_surrogate_pair_is_the_clients_mistake(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.encode("a\ud800")
    assert caught.value.status == 400


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert len(Tokenizer(tmp_path).encode("xyzxyz")) == 6


def test_encoding_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    text = "some words of no great length " * 15_000
    done = threading.Event()

    def encode() -> None:
        tokenizer.encode(text)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    longest_s, start_s = 0.0, time.perf_counter()
    last_s = start_s
    while not done.is_set():
        now_s = time.perf_counter()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    thread.join()
    assert longest_s < 0.5 * (last_s - start_s)  # who holds the interpreter lock makes it one long pause


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: no such file"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", "{", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", "\udcff", r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 7}', r"tokenizer_config\.json: chat_template is neither"),
        ("chat_template.jinja", "{% for x in %}", r"model: the chat template does not compile"),
        ("chat_template.jinja", "{{ 1 | no_such_filter }}", r"model: the chat template does not compile"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | None, complaint: str) -> None:
    path = write_tiny_model(tmp_path / "model") / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=complaint):
        Tokenizer(path.parent)


def test_only_byte_level_tokenizers(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    inner.decoder = decoders.Metaspace()
    inner.save(str(path / "tokenizer.json"))
    with pytest.raises(ModelError, match="not ByteLevel"):
        Tokenizer(path)


# --- the chat template

# Everything that Qwen3's published template does, in fewer words.
QWEN_LIKE = """
{% if messages %}
    {% if true %}
  head
    {% endif %}
{% endif %}
{%- if tools %}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""


@pytest.mark.parametrize("enable_thinking", [None, True, False])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_what_transformers_renders(
    open_model: Callable[..., Tokenizer], enable_thinking: bool | None, add_generation_prompt: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template
    messages = [
        {"role": "system", "content": "Be terse. ä €"},
        {"role": "user", "content": "1 < 2 & \"3\" 'four'\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "\n", "reasoning_content": "\nlook it up\n"},
        {"role": "tool", "content": "42"},
        {"role": "tool", "content": "43"},
    ]
    tools = [{"name": "f", "arguments": {"<x>": "ä'"}}]
    kwargs = {"add_generation_prompt": add_generation_prompt}
    thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    (expected,), _ = render([messages], tools=tools, chat_template=QWEN_LIKE, **kwargs, **thinking)
    tokenizer = open_model(chat_template=QWEN_LIKE)
    rendered = tokenizer.render_chat(
        messages, enable_thinking=enable_thinking, template_kwargs={"tools": tools}, **kwargs
    )
    assert rendered == expected
    assert ("<think>\n\n</think>" in rendered) == (enable_thinking is False and add_generation_prompt)


def test_special_tokens_and_extra_variables_reach_the_template(open_model: Callable[..., Tokenizer]) -> None:
    template = "{{ eos_token }}{{ bos_token is defined }}{{ style }}{{ tools is none }}{{ messages[0].content }}"
    tokenizer = open_model(chat_template=template, eos_token={"content": "<|end|>"}, bos_token=None)
    kwargs = {"style": "curt", "messages": "not these"}
    assert tokenizer.render_chat(USER, template_kwargs=kwargs) == "<|end|>FalsecurtTrueHi"
    assert tokenizer.eos_token_id == END_ID


def test_a_template_can_tell_the_date_skip_and_break(open_model: Callable[..., Tokenizer]) -> None:
    template = (
        "{{ strftime_now('%Y') | length }}"
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert open_model(chat_template=template).render_chat(USER) == "4023"


def test_the_default_of_named_templates_is_taken(open_model: Callable[..., Tokenizer]) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert open_model(chat_template=named).render_chat(USER) == "plain"


def test_a_template_file_goes_before_the_configuration(open_model: Callable[..., Tokenizer], tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("from the file")
    assert open_model(chat_template="from the configuration").render_chat(USER) == "from the file"


def test_a_model_without_a_template_says_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.render_chat(USER)
    assert (caught.value.status, caught.value.param) == (400, "messages")


TOO_LONG, TOO_LARGE = r"it ran for more than 0\.5 s", "it needed more than 268,435,456 bytes of memory"
NESTED_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
HOSTILE = {
    "endless loop": (NESTED_LOOPS.replace("BODY", ""), TOO_LONG),
    "endless output": (NESTED_LOOPS.replace("BODY", "x" * 999), "the text is longer than 4,194,304 characters"),
    "endless recursion": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "one vast string": ("{{ messages[0].role * 10 ** 10 }}", TOO_LARGE),
    "doubled strings": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        TOO_LARGE,
    ),
    "replaced strings": ("{% set x = 'a' * 99999 %}{{ x.replace('a', x) | length }}", TOO_LARGE),
    "one vast number": ("{{ 10 ** (10 ** 8 * messages | length) % 7 }}", TOO_LONG),
    "vast padding": ("{{ '%1000000000d' % (messages | length) }}", TOO_LARGE),
    "vast range": ("{{ range(10 ** 12) | list | length }}", "Range too big"),
    "a hole in the sandbox": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "a complaint": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "an endless complaint": ("{{ raise_exception('x' * 10 ** 7) }}", "xxx"),
    "a mistake": ("{{ messages[0].content.no_such_method() }}", "no_such_method"),
}


@pytest.mark.parametrize(("template", "cause"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_end_in_a_client_error(template: str, cause: str) -> None:
    hostile = ChatTemplate(template, "model", time_limit_s=0.5)
    start_s = time.monotonic()
    with pytest.raises(RequestError, match=f"cannot render these messages: .*{cause}") as caught:
        hostile.render({"messages": USER})
    hostile.close()
    assert caught.value.status == 400
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - start_s < 2.5  # generous: other work may hold the cores


def test_a_template_that_takes_for_ever_to_compile_is_the_models_mistake() -> None:
    with pytest.raises(ModelError, match=r"model: the chat template does not compile: it ran for more than 0\.3 s"):
        ChatTemplate("{{ 10 ** (10 ** 8) % 7 }}", "model", time_limit_s=0.3)


@pytest.fixture
def fickle() -> Iterator[ChatTemplate]:
    """A template that its messages can send astray."""
    template = ChatTemplate(
        "{% for m in messages %}{{ m }}"
        "{% for a in range(m | int) %}{% for b in range(m | int) %}{% endfor %}{% endfor %}{% endfor %}",
        "model",
        time_limit_s=0.3,
        output_limit_chars=1000,
    )
    yield template
    template.close()


def process_of(template: ChatTemplate) -> "subprocess.Popen[bytes]":
    return template._worker


def test_the_alarm_works_where_the_daemon_ignores_it() -> None:
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        template = ChatTemplate(NESTED_LOOPS.replace("BODY", ""), "model", time_limit_s=0.3)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(RequestError, match=r"ran for more than 0\.3 s"):
        template.render({})
    template.close()


def test_a_template_works_again_after_it_was_stopped(fickle: ChatTemplate) -> None:
    first = process_of(fickle)
    with pytest.raises(RequestError, match=r"ran for more than 0\.3 s"):
        fickle.render({"messages": ["99999"]})
    assert first.poll() is not None  # nothing runs on
    assert fickle.render({"messages": ["a", "3"]}) == "a3"


def test_output_is_limited_to_the_character(fickle: ChatTemplate) -> None:
    assert fickle.render({"messages": ["ä" * 1000]}) == "ä" * 1000
    with pytest.raises(RequestError, match="longer than 1,000 characters"):
        fickle.render({"messages": ["ä" * 1000, "b"]})


def test_messages_nested_too_deep_are_the_clients_mistake(fickle: ChatTemplate) -> None:
    deep: list[Any] = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deep"):
        fickle.render({"messages": deep})


def test_a_template_whose_process_was_killed_starts_another(fickle: ChatTemplate) -> None:
    process_of(fickle).kill()
    process_of(fickle).wait()
    assert fickle.render({"messages": ["still here"]}) == "still here"


def test_threads_take_turns(fickle: ChatTemplate) -> None:
    answers: dict[int, str] = {}

    def render(i: int) -> None:
        answers[i] = fickle.render({"messages": [f"m{i}"]})

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: f"m{i}" for i in range(8)}


def test_the_process_ends_with_its_owner_but_not_by_the_terminals_ctrl_c() -> None:
    template = ChatTemplate("x", "model")
    worker = process_of(template)
    assert os.getsid(worker.pid) == worker.pid  # a session of its own
    del template
    assert worker.poll() is not None


def test_the_process_does_not_outlive_a_killed_daemon() -> None:
    script = (
        "import os\nfrom hmad.compute.chat_template import ChatTemplate\n"
        "template = ChatTemplate('x', 'model')\nprint(template._worker.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    pid = int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False).stdout)
    deadline_s = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# --- text token by token


def first_stop(text: str, stops: Sequence[str], include_stop: bool) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, the longest of several, by looking at every beginning."""
    for end in range(len(text) + 1):
        complete = [s for s in stops if s and text[:end].endswith(s)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def token_streams() -> st.SearchStrategy[list[int]]:
    """Any ids, and runs of few different bytes, in which characters and stop strings come about."""
    few = st.sampled_from([97, 98, 99, 256, 257, 258, 259, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, END_ID, 261, 262, 264])
    return st.lists(st.integers(0, NUM_IDS - 1) | few, max_size=40) | st.lists(few, max_size=40)


@settings(max_examples=250, deadline=None)
@given(
    token_streams(),
    st.lists(st.text("abc\ufffd中<t…", min_size=1, max_size=5) | st.just("abab"), max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_deltas_make_up_the_decoded_text(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], include_stop: bool, skip_special: bool
) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=skip_special)
    expected, stop = first_stop(whole, stops, include_stop)
    incremental = IncrementalDetokenizer(tokenizer, stops, include_stop=include_stop, skip_special_tokens=skip_special)
    deltas = [incremental.feed(i) for i in ids]
    assert expected.startswith("".join(deltas))
    assert "".join(deltas) + incremental.flush() == expected
    assert incremental.stopped == stop
    assert incremental.flush() == ""


def test_characters_and_possible_stop_strings_are_held_back(tokenizer: Tokenizer) -> None:
    incremental = IncrementalDetokenizer(tokenizer, ["</s>"])
    chunks = [incremental.feed(i) for i in "é".encode()]
    assert chunks == ["", "é"]
    assert [incremental.feed(ord(c)) for c in "a</x</s"] == ["a", "", "", "</x", "", "", ""]
    assert incremental.feed(ord(">")) == ""
    assert incremental.stopped == "</s>"
    assert incremental.feed(ord("b")) == ""


def test_the_longest_of_stop_strings_that_end_together_is_cut(tokenizer: Tokenizer) -> None:
    for stops in (["c", "bc"], ["bc", "c"]):
        incremental = IncrementalDetokenizer(tokenizer, stops)
        assert "".join(incremental.feed(ord(c)) for c in "abc") == "a"
        assert incremental.stopped == "bc"


@given(st.text("ab", min_size=1, max_size=8), st.text("ab", max_size=40))
def test_a_stop_string_is_found_where_it_first_ends(stop: str, text: str) -> None:
    search = StopString(stop)
    ends = next((i + 1 for i, char in enumerate(text) if search.advance(char)), None)
    position = text.find(stop)
    assert ends == (None if position < 0 else position + len(stop))


def test_the_work_per_token_does_not_grow(tokenizer: Tokenizer) -> None:
    """A long run without a certain character or with an ever possible stop string: the worst streams there are."""
    for token_id, stops in ((0xB8, ()), (97, ("a" * 500 + "b",))):
        incremental = IncrementalDetokenizer(tokenizer, stops)
        start_s = time.thread_time()
        deltas = [incremental.feed(token_id) for _ in range(50_000)]
        assert time.thread_time() - start_s < 2.0  # some 0.1 s; re-decoding the text would take minutes
        assert "".join(deltas) + incremental.flush() == tokenizer.decode([token_id] * 50_000)


def test_the_embedded_checkpoint_chats() -> None:
    tokenizer = Tokenizer(CHECKPOINT)
    tokenizer.check_vocab(json.loads((CHECKPOINT / "config.json").read_text())["vocab_size"])
    prompt = tokenizer.render_chat([{"role": "user", "content": "Wie heißt „中“?"}], enable_thinking=False)
    tokenizer.close()
    assert prompt.startswith("<|im_start|>user\nWie heißt „中“?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    incremental = IncrementalDetokenizer(tokenizer, ["<|im_end|>"], skip_special_tokens=False)
    assert "".join(map(incremental.feed, ids)) == prompt[: prompt.index("<|im_end|>")]
    assert tokenizer.eos_token_id in ids
