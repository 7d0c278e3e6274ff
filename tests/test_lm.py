"""What users call: generate, stream, read, ask, perplexity, loglikelihood; and what they do wrong."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sentencekv import Generation, LongContextLM, UnsupportedModelError, fused, policies
from sentencekv.fused import FusedLayers
from tests.conftest import make_model

SMALL = {
    "budget_tokens": 96,
    "sink_tokens": 4,
    "window_tokens": 12,
    "max_sentence_tokens": 16,
    "min_sentence_tokens": 4,
    "prefill_chunk_tokens": 100,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def lm(tokenizer: PreTrainedTokenizerFast) -> LongContextLM:
    return LongContextLM.from_model(make_model("llama"), tokenizer, **SMALL)


@pytest.fixture(scope="module")
def chat_lm(tokenizer: PreTrainedTokenizerFast) -> LongContextLM:
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<begin>")
    chatty.chat_template = TEMPLATE
    return LongContextLM.from_model(make_model("llama"), chatty, **SMALL)


def test_generation_tells_what_happened(lm: LongContextLM, prose: str) -> None:
    seen: list[tuple[int, int]] = []
    text = prose[:1800]
    out = lm.generate(text, max_new_tokens=9, logprobs=True, progress=lambda done, total: seen.append((done, total)))
    assert isinstance(out, Generation)
    assert len(out.token_ids) == 9
    assert out.finish_reason == "length"
    assert out.text == lm.tokenizer.decode(out.token_ids, skip_special_tokens=True)
    assert out.logprobs is not None
    assert len(out.logprobs) == 9
    assert all(value <= 0 for value in out.logprobs)
    stats = out.stats
    num_tokens = len(lm.tokenizer(text).input_ids)
    assert seen[-1] == (num_tokens, num_tokens)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert stats.context_tokens == num_tokens
    assert stats.generated_tokens == 9
    assert stats.kv_dense_bytes == (num_tokens + 8) * 3 * 2 * 2 * 12 * 4
    assert 0 < stats.kv_gpu_bytes < stats.kv_dense_bytes
    assert stats.kv_host_bytes > 0.8 * stats.kv_dense_bytes
    assert stats.hot_hit_rate is not None
    assert 0 < stats.hot_hit_rate < 1
    assert stats.tokens_fetched > 0
    assert stats.seconds_to_first_token > 0
    assert stats.seconds_per_token is not None
    assert out.sources
    assert [s.share for s in out.sources] == sorted((s.share for s in out.sources), reverse=True)
    assert sum(s.share for s in out.sources) < 1
    for source in out.sources:
        assert text[source.start : source.end].strip() == source.text
    assert len({s.start for s in out.sources}) == len(out.sources)


def test_logprobs_match_loglikelihood(lm: LongContextLM, prose: str) -> None:
    """Greedy text scored as a continuation gets just the log-probabilities it was drawn with."""
    full = lm.with_config(policy="full")
    for engine in (lm, full):
        out = engine.generate(prose[:700], max_new_tokens=6, logprobs=True)
        ids = engine.tokenizer(prose[:700] + out.text).input_ids
        if ids[-6:] != out.token_ids:
            continue  # the text does not tokenise back to the same tokens
        scored = engine.loglikelihood(prose[:700], out.text)
        assert scored.is_greedy
        assert scored.num_tokens == 6
        assert scored.value == pytest.approx(sum(out.logprobs), abs=1e-3)


def test_reading_and_scoring_run_fused_layers(
    tokenizer: PreTrainedTokenizerFast, prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the model, which other configurations share; asked for here, as on a GPU they are by themselves."""
    lm = LongContextLM.from_model(make_model("llama"), tokenizer, policy="full", **SMALL)
    want = lm.generate(prose[:700], max_new_tokens=8).text, lm.loglikelihood(prose[:300], prose[300:350]).value
    assert lm._engine.layers.num_fused == 0
    lm._engine.layers = FusedLayers(lm.model, force=True)
    runs: list[int] = []
    run = fused._FusedLayer.run
    monkeypatch.setattr(fused._FusedLayer, "run", lambda *given: runs.append(len(given[1])) or run(*given))
    for engine in (lm, lm.with_config(window_tokens=20)):
        assert engine.generate(prose[:700], max_new_tokens=8).text == want[0]
        assert sum(runs) == 3 * len(lm.tokenizer(prose[:700]).input_ids)
        runs.clear()
        assert engine.loglikelihood(prose[:300], prose[300:350]).value == pytest.approx(want[1], rel=1e-4)
        assert sum(runs) > 3 * len(lm.tokenizer(prose[:300]).input_ids)
        runs.clear()


@pytest.mark.parametrize("policy", ["mean", "codes", "window", "full"])
def test_adopting_is_reading_again(lm: LongContextLM, prose: str, policy: str) -> None:
    """Under another policy and budget; KV is shared, and stays when the first document is closed."""
    text, question = prose[:4000], "What is it about?"
    other = lm.with_config(policy=policy, policy_options={}, budget_tokens=160)
    with lm.read(text) as document, other.read(text) as again:
        held = lm.host_bytes_in_use
        adopted = other.adopt(document)
        assert lm.host_bytes_in_use == held
        wanted = again.ask(question, max_new_tokens=12, logprobs=True)
        first = adopted.ask(question, max_new_tokens=12, logprobs=True)
    for generation in (first, adopted.ask(question, max_new_tokens=12, logprobs=True)):
        assert generation.text == wanted.text
        assert generation.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        # But for the room in which tables grow.
        assert generation.stats.kv_gpu_bytes == pytest.approx(wanted.stats.kv_gpu_bytes, rel=0.1)
    adopted.close()


def test_what_cannot_be_adopted(lm: LongContextLM, tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    document = lm.read(prose[:900])
    for changes in ({"sink_tokens": 3}, {"max_sentence_tokens": 6}, {"kv_dtype": "int8"}):
        (name,) = changes
        with pytest.raises(ValueError, match=f"was read with {name}=.*read it again"):
            lm.with_config(**changes).adopt(document)
    with pytest.raises(ValueError, match="another LongContextLM"):
        LongContextLM.from_model(lm.model, tokenizer, **SMALL).adopt(document)
    with pytest.raises(ValueError, match="another LongContextLM"):
        lm.with_config(host_memory_bytes=1 << 30).adopt(document)
    document.close()
    with pytest.raises(ValueError, match="closed"):
        lm.adopt(document)
    with pytest.raises(TypeError, match=r"takes a Document, got .*read a text"):
        lm.adopt(prose)  # type: ignore[arg-type]


def test_loglikelihood_equals_dense(lm: LongContextLM, prose: str) -> None:
    context, continuation = prose[:600], prose[600:650]
    ids = lm.tokenizer(context + continuation, return_tensors="pt").input_ids
    num_context = len(lm.tokenizer(context).input_ids)
    with torch.inference_mode():
        logprob = lm.model(ids).logits[0].log_softmax(-1)
    expected = sum(float(logprob[i - 1, ids[0, i]]) for i in range(num_context, ids.shape[1]))
    for engine in (lm.with_config(policy="full"), lm.with_config(budget_tokens=1024)):
        scored = engine.loglikelihood(context, continuation)
        assert scored.value == pytest.approx(expected, rel=1e-4)
        assert scored.num_tokens == ids.shape[1] - num_context
        assert not scored.is_greedy


def test_perplexity_equals_dense_windows(lm: LongContextLM, prose: str) -> None:
    text = prose[:900]
    ids = lm.tokenizer(text, return_tensors="pt").input_ids
    context, stride = 150, 64
    total = 0.0
    for start in range(context, ids.shape[1], stride):
        window = ids[:, start - context : start + stride]
        with torch.inference_mode():
            logprob = lm.model(window).logits[0].log_softmax(-1)
        total += sum(float(logprob[i - 1, window[0, i]]) for i in range(context, window.shape[1]))
    count = ids.shape[1] - context
    for engine in (lm.with_config(policy="full"), lm.with_config(budget_tokens=1024)):
        result = engine.perplexity(text, context_tokens=context, stride=stride)
        assert result.num_tokens == count
        assert result.log_likelihood == pytest.approx(total, rel=1e-4)
        assert result.value == pytest.approx(float(torch.tensor(-total / count).exp()), rel=1e-4)
    assert lm.perplexity(text, context_tokens=context, stride=stride).value != pytest.approx(result.value, rel=1e-6)


def test_stream_is_generate_in_pieces(lm: LongContextLM, prose: str) -> None:
    whole = lm.generate(prose[:400], max_new_tokens=12)
    stream = lm.stream(prose[:400], max_new_tokens=12)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = stream.generation
    assert "".join(stream) == whole.text
    assert stream.generation.token_ids == whole.token_ids


def test_seeds_and_stop(lm: LongContextLM, prose: str) -> None:
    draw = {"max_new_tokens": 10, "temperature": 1.5, "top_p": 0.95}
    first, again, other = (lm.generate(prose[:300], seed=s, **draw).token_ids for s in (1, 1, 2))
    assert first == again != other
    text = lm.generate(prose[:300], max_new_tokens=20).text
    stop = text[4:6]
    stopped = lm.generate(prose[:300], max_new_tokens=20, stop=stop)
    assert stopped.text == text[: text.find(stop)]
    assert stopped.finish_reason == "stop"


def test_long_generation_offloads_its_own_text(lm: LongContextLM, prose: str) -> None:
    short, long = (lm.generate(prose[:300], max_new_tokens=count) for count in (2, 150))
    assert long.token_ids[:2] == short.token_ids
    closed = (long.stats.sentences - short.stats.sentences) * SMALL["max_sentence_tokens"]
    assert closed >= 148 - SMALL["window_tokens"] - 2 * SMALL["max_sentence_tokens"], "the tail was closed"


def test_merged_continuation_is_scored(lm: LongContextLM) -> None:
    """Context and continuation may meet within one token; with too little of both there is nothing to score."""
    text = "the other"
    assert lm.loglikelihood("the oth", "er").num_tokens >= 1
    first = next(a + b for a in "thein" for b in "hean" if len(lm.tokenizer(a + b).input_ids) == 1)
    with pytest.raises(ValueError, match="become one token"):
        lm.loglikelihood(first[0], first[1])
    assert lm.loglikelihood(text, " one").num_tokens >= 1


def test_foreign_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    lm = LongContextLM.from_model(make_model("llama", vocab_size=100), tokenizer, **SMALL)
    with pytest.raises(ValueError, match="the model knows 100"):
        lm.generate(prose[:100], max_new_tokens=1)


def test_perplexity_without_a_sink(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    """The begin token in front of a window is a sentence of its own, not one token too many in the next."""
    with_begin = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<begin>")
    lm = LongContextLM.from_model(make_model("llama"), with_begin, **{**SMALL, "sink_tokens": 0})
    assert lm.perplexity("<begin>" + prose[:900], context_tokens=120, stride=60).num_tokens > 100


@pytest.mark.parametrize("name", policies.available())
def test_document_equals_prompt(lm: LongContextLM, prose: str, name: str) -> None:
    """Asking a document what `generate` is asked at once gives the same tokens while the budget covers both."""
    engine = lm.with_config(policy=name, budget_tokens=1024 if name != "window" else 96)
    frame_text = f"{prose[:900]}\n\nQuestion: Who?\nAnswer:"
    with engine.read(prose[:900]) as document:
        asked = document.ask("Who?", max_new_tokens=8)
        assert asked.token_ids == document.ask("Who?", max_new_tokens=8).token_ids, "asking leaves no trace"
        joined = engine.generate(frame_text, max_new_tokens=8)
        same_tokens = len(engine.tokenizer(frame_text).input_ids) == asked.stats.context_tokens
        assert not same_tokens or name == "window" or asked.token_ids == joined.token_ids


def test_many_questions_share_one_reading(chat_lm: LongContextLM, prose: str) -> None:
    document = chat_lm.read(prose[:1200])
    in_use = chat_lm.host_bytes_in_use
    assert in_use == document.kv_host_bytes > 0
    first = document.stream("Who was it?", max_new_tokens=5)
    second = document.stream("Where was it?", max_new_tokens=5)
    mixed = [next(first), next(second), *first, *second]
    assert mixed
    assert first.generation.token_ids == document.ask("Who was it?", max_new_tokens=5).token_ids
    spans = [(s.start, s.end, s.text) for s in second.generation.sources]
    assert spans
    assert all(document.text[start:end].strip() == text for start, end, text in spans)
    other = chat_lm.read(prose[1200:1500])
    assert other.ask("What?", max_new_tokens=2).text is not None
    del first, second
    other.close()
    document.close()
    document.close()
    gc.collect()
    assert chat_lm.host_bytes_in_use == 0
    with pytest.raises(ValueError, match="closed; read it again"):
        document.ask("Who?")


def test_chat_template_surrounds_document_and_question(chat_lm: LongContextLM, prose: str) -> None:
    engine = chat_lm.with_config(budget_tokens=1024)
    messages = [{"role": "user", "content": f"{prose[:600]}\n\nWho?"}]
    expected = engine.generate(messages, max_new_tokens=4)
    asked = engine.read(prose[:600]).ask("Who?", max_new_tokens=4)
    if asked.stats.context_tokens == expected.stats.context_tokens:
        assert asked.token_ids == expected.token_ids
    plain = engine.read(prose[:600], chat=False).ask("Who?", max_new_tokens=4)
    assert plain.stats.context_tokens != asked.stats.context_tokens


def test_progress_can_cancel(lm: LongContextLM, prose: str) -> None:
    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.read(prose[:1500], progress=cancel)
    gc.collect()
    assert lm.host_bytes_in_use == 0
    assert lm.generate(prose[:200], max_new_tokens=2).text is not None


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "the prompt is empty"),
        (5, TypeError, "must be a string, a list of strings or chat messages, got int"),
        (None, TypeError, "got NoneType"),
        (b"bytes", TypeError, "got"),
        ([], TypeError, "an empty list"),
        (["a", ""], ValueError, "the prompt is empty"),
        (["a", 7], TypeError, "got int"),
        ([{"role": "user", "content": "Hi"}], ValueError, "no chat template"),
        ("word " * 9000, ValueError, "has positions for 4096"),
        ("\ud800", ValueError, "not valid Unicode"),
    ],
)
def test_bad_prompts(lm: LongContextLM, prompt: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lm.generate(prompt, max_new_tokens=2)  # type: ignore[call-overload]


@pytest.mark.parametrize("bad", [{"role": "user"}, {"content": "x"}, "text", {"role": "user", "content": 3}])
def test_bad_messages(chat_lm: LongContextLM, bad: object) -> None:
    with pytest.raises((ValueError, TypeError), match="chat message"):
        chat_lm.generate([{"role": "user", "content": "Hi"}, bad], max_new_tokens=2)  # type: ignore[list-item]


def test_bad_documents_and_questions(lm: LongContextLM, prose: str) -> None:
    for text in ("", " \n\t"):
        with pytest.raises(ValueError, match="the document is empty"):
            lm.read(text)
    with pytest.raises(TypeError, match="must be a string"):
        lm.read(b"a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no chat template"):
        lm.read(prose[:100], chat=True)
    with lm.read(prose[:300]) as document:
        with pytest.raises(ValueError, match="a question must be"):
            document.ask(" ")
        with pytest.raises(ValueError, match="positions for 4096: shorten the text or lower max_new_tokens"):
            document.ask("Who?", max_new_tokens=5000)


def test_bad_settings(lm: LongContextLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unknown setting 'budget'; there are: policy, "):
        lm.with_config(budget=3)
    with pytest.raises(ValueError, match="unknown policy 'best'; available"):
        lm.with_config(policy="best")
    with pytest.raises(ValueError, match="positions"):
        lm.perplexity("word " * 9000, context_tokens=5000)
    with pytest.raises(ValueError, match="all of them context"):
        lm.perplexity("few words", context_tokens=100)
    with pytest.raises(ValueError, match="stride"):
        lm.perplexity("few words here", stride=0)
    with pytest.raises(ValueError, match="continuation"):
        lm.loglikelihood("context", "")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        LongContextLM.from_model("pocket", tokenizer)  # type: ignore[arg-type]


def test_documents_read_together(lm: LongContextLM, prose: str) -> None:
    """The same answers as each read by itself, and each is freed by itself."""
    texts = [prose[:1500], prose[1500:1600], "A boat.", prose[2000:3300]]
    seen: list[tuple[int, int]] = []
    documents = lm.read(texts, progress=lambda done, total: seen.append((done, total)))
    assert [document.text for document in documents] == texts
    total = sum(document.num_tokens for document in documents)
    assert seen[-1] == (total, total)
    assert len(seen) < sum(-(-document.num_tokens // 100) for document in documents), "short ones share a pass"
    for document, text in zip(documents, texts, strict=True):
        alone = lm.read(text)
        assert document.num_sentences == alone.num_sentences
        assert document.ask("Who?", max_new_tokens=12).token_ids == alone.ask("Who?", max_new_tokens=12).token_ids
    del document, alone
    held = lm.host_bytes_in_use
    documents.pop(0).close()
    gc.collect()
    assert 0 < lm.host_bytes_in_use < held
    for wrong in ([], 3, ["a", 3]):
        with pytest.raises(TypeError, match="a document must be a string"):
            lm.read(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the document is empty"):
        lm.read(["a", " "])


def test_reading_that_is_cancelled_leaves_nothing(lm: LongContextLM, prose: str) -> None:
    gc.collect()
    held = lm.host_bytes_in_use

    def cancel(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for texts in (prose[:3000], [prose[:1500], prose[1500:3000]]):
        with pytest.raises(KeyboardInterrupt):
            lm.read(texts, progress=cancel)
        gc.collect()
        assert lm.host_bytes_in_use == held
    assert lm.read(prose[:600]).ask("Who?", max_new_tokens=4).token_ids


def test_host_memory_is_checked_before_reading(lm: LongContextLM, prose: str) -> None:
    small = lm.with_config(host_memory_bytes=10_000)
    calls: list[int] = []
    with pytest.raises(MemoryError, match=r"needs \d+\.\d+ KiB .*\(host_memory_bytes"):
        small.read(prose[:3000], progress=lambda done, total: calls.append(done))
    assert not calls


@pytest.mark.parametrize("policy", ["full", "codes"])
def test_logits_are_what_tokens_are_drawn_from(lm: LongContextLM, prose: str, policy: str) -> None:
    lm = lm.with_config(policy=policy, budget_tokens=2048)
    text = prose[:700]
    ids = lm.tokenizer(text, return_tensors="pt").input_ids
    logits = lm.logits(text, context_tokens=ids.shape[1] - 20)
    assert logits.shape == (20, lm.model.config.vocab_size)
    with torch.inference_mode():
        dense = lm.model(ids).logits[0, -21:-1]
    torch.testing.assert_close(logits, dense, rtol=1e-3, atol=1e-3)
    scores = logits.log_softmax(-1).gather(1, ids[0, -20:, None]).sum()
    perplexity = lm.perplexity(text, context_tokens=ids.shape[1] - 20)
    assert perplexity.log_likelihood == pytest.approx(float(scores), abs=1e-3)
    for wrong in (0, ids.shape[1], -1, 2.5):
        with pytest.raises(ValueError, match="context_tokens must be a whole number"):
            lm.logits(text, context_tokens=wrong)


def test_nan_weights(tokenizer: PreTrainedTokenizerFast, prose: str) -> None:
    model = make_model("llama")
    lm = LongContextLM.from_model(model, tokenizer, **SMALL)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        lm.generate(prose[:200], max_new_tokens=2)
    with pytest.raises(FloatingPointError, match="NaN"):
        lm.loglikelihood("One two", " three")


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class TestFromPretrained:
    def test_loads_a_folder(self, folder: Path, lm: LongContextLM, prose: str) -> None:
        loaded = LongContextLM.from_pretrained(folder, device="cpu", **SMALL)
        assert loaded.model.dtype == torch.float32
        assert loaded.generate(prose[:300], max_new_tokens=5).token_ids == (
            lm.generate(prose[:300], max_new_tokens=5).token_ids
        )

    @pytest.mark.parametrize("damage", ["config", "weights", "truncated", "tokenizer"])
    def test_corrupt_folder(self, folder: Path, tmp_path: Path, damage: str) -> None:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = tmp_path / "model.safetensors"
        if damage == "config":
            (tmp_path / "config.json").write_text("{ not json")
        elif damage == "weights":
            weights.unlink()
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        else:
            (tmp_path / "tokenizer.json").write_text("{}")
            (tmp_path / "tokenizer_config.json").unlink()
        with pytest.raises(OSError, match="cannot load a model from") as caught:
            LongContextLM.from_pretrained(tmp_path, device="cpu")
        assert "\n" not in str(caught.value)

    def test_missing_folder(self) -> None:
        with pytest.raises(FileNotFoundError, match=r"no model folder at '\./nowhere'"):
            LongContextLM.from_pretrained("./nowhere")

    def test_bad_device_and_dtype(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="device must be"):
            LongContextLM.from_pretrained(folder, device="abacus")
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="0 CUDA devices; use device='cpu'"):
                LongContextLM.from_pretrained(folder, device="cuda")
        with pytest.raises(ValueError, match="dtype must be"):
            LongContextLM.from_pretrained(folder, dtype="float7")
        with pytest.raises(ValueError, match="dtype must be"):
            LongContextLM.from_pretrained(folder, dtype="int8")

    def test_bad_settings_are_known_before_loading(self) -> None:
        with pytest.raises(ValueError, match="unknown policy"):
            LongContextLM.from_pretrained("./nowhere", policy="best")
        with pytest.raises(ValueError, match="must exceed"):
            LongContextLM.from_pretrained("./nowhere", budget_tokens=10)


def test_unsupported_model(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnsupportedModelError, match="no rotary"):
        LongContextLM.from_model(make_model("gpt2", n_embd=48, n_head=4, n_layer=2), tokenizer)
