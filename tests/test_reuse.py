"""Reuse through LongContextLM: answers are those of reading in full wherever that is promised, and say what was
reused."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sentencekv import LongContextLM, UnsupportedModelError, policies
from sentencekv.reuse.catalog import CatalogError, Statistics
from tests.conftest import make_model

SMALL: dict[str, Any] = {
    "budget_tokens": 96,
    "sink_tokens": 4,
    "window_tokens": 12,
    "max_sentence_tokens": 16,
    "min_sentence_tokens": 4,
    "prefill_chunk_tokens": 100,
}
NEW_TOKENS = 4
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_lm(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LongContextLM:
    return LongContextLM.from_model(make_model("llama"), tokenizer, **{**SMALL, **changes})


def statistics(lm: LongContextLM, namespace: str = "default") -> Statistics:
    cache = lm._engine.prompt_cache
    assert cache is not None
    return cache.catalog.statistics(namespace)


@pytest.fixture(scope="module")
def off(tokenizer: PreTrainedTokenizerFast) -> LongContextLM:
    return make_lm(tokenizer)


@pytest.fixture
def lm(tokenizer: PreTrainedTokenizerFast) -> LongContextLM:
    return make_lm(tokenizer, reuse="similar")


@pytest.fixture(scope="module")
def parts(prose: str) -> list[str]:
    """Of about 145 tokens each."""
    return [prose[start : start + 300].strip() + "\n\n" for start in range(0, 6000, 300)]


@pytest.fixture(scope="module")
def text(parts: list[str]) -> str:
    return "".join(parts[:5])


@pytest.fixture(scope="module")
def moved(parts: list[str]) -> str:
    """The first paragraph stays, the others change places."""
    return "".join(parts[i] for i in (0, 3, 4, 1, 2))


def tokens_of(lm: LongContextLM, prompt: Any, **options: Any) -> list[int]:
    return lm.generate(prompt, max_new_tokens=NEW_TOKENS, **options).token_ids


class TestAnswers:
    @pytest.mark.parametrize("policy", policies.available())
    def test_the_same_and_longer_prompts(
        self, policy: str, tokenizer: PreTrainedTokenizerFast, text: str, parts: list[str], device: torch.device
    ) -> None:
        """Under every policy: tokens, their probabilities and the sentences read are those of reading in full."""
        settings = {"policy": policy, **policies.policy_class(policy).settings}
        off = LongContextLM.from_model(make_model("llama").to(device), tokenizer, **{**SMALL, **settings})
        lm = off.with_config(reuse="exact")
        for prompt, kind in ((text, "none"), (text, "same"), (text + parts[9], "prefix"), (text[:700], "prefix")):
            ours, want = (each.generate(prompt, max_new_tokens=NEW_TOKENS, logprobs=True) for each in (lm, off))
            assert want.reuse is None
            assert ours.reuse is not None
            assert (ours.reuse.kind, ours.reuse.approximate) == (kind, False)
            assert ours.token_ids == want.token_ids
            assert ours.logprobs == pytest.approx(want.logprobs, abs=1e-4)
            assert [source.text for source in ours.sources] == [source.text for source in want.sources]
            assert ours.stats.kv_dense_bytes == want.stats.kv_dense_bytes

    @pytest.mark.parametrize("architecture", ["qwen3", "phi3", "smollm3", "glm4", "gpt_neox", "mixtral"])
    def test_all_architectures(
        self, architecture: str, tokenizer: PreTrainedTokenizerFast, text: str, moved: str, parts: list[str]
    ) -> None:
        off = LongContextLM.from_model(make_model(architecture), tokenizer, **SMALL)
        exact = off.with_config(reuse="exact")
        similar = off.with_config(reuse="similar", reuse_options={"first_tokens": 5000, "min_gain": 0.0})
        for prompt in (text, text, text + parts[9], moved):
            want = tokens_of(off, prompt)
            assert tokens_of(exact, prompt) == want
            assert tokens_of(similar, prompt) == want, "all moved tokens are computed anew"
        assert similar.generate(moved, max_new_tokens=1).reuse.approximate

    def test_a_wrong_donor(self, lm: LongContextLM, off: LongContextLM, text: str, parts: list[str]) -> None:
        """Costs a look and nothing else: the answer is that of reading in full, to the last bit."""
        lm.generate(text, max_new_tokens=2)
        other = "".join(parts[10:15])
        ours, want = (each.generate(other, max_new_tokens=NEW_TOKENS, logprobs=True) for each in (lm, off))
        assert ours.reuse.kind == "none"
        assert ours.reuse.reason == "nothing like it is cached"
        assert (ours.token_ids, ours.logprobs, ours.sources) == (want.token_ids, want.logprobs, want.sources)

    def test_similar_prompts_are_retrieved_from(self, lm: LongContextLM, text: str, moved: str) -> None:
        """Sentence by sentence under the budget, as any prompt: what moved is found where it is now."""
        lm.generate(text, max_new_tokens=2)
        out = lm.generate(moved, max_new_tokens=NEW_TOKENS)
        assert (out.reuse.kind, out.reuse.approximate) == ("similar", True)
        assert out.stats.policy == "codes"
        assert out.stats.hot_hit_rate is not None
        assert out.stats.tokens_fetched > 0
        assert 0 < out.stats.kv_gpu_bytes < out.stats.kv_dense_bytes
        assert out.sources
        for source in out.sources:
            assert moved[source.start : source.end].strip() == source.text

    def test_what_is_reported(self, lm: LongContextLM, text: str, moved: str) -> None:
        total = len(lm.tokenizer(moved).input_ids)
        lm.generate(text, max_new_tokens=2)
        reuse = lm.generate(moved, max_new_tokens=2).reuse
        assert (reuse.prompt_tokens, reuse.fuzzy_tokens) == (total, 0)
        assert reuse.prefix_tokens > 100
        assert reuse.moved_tokens + reuse.kept_tokens > 0.7 * total
        assert reuse.prefix_tokens + reuse.kept_tokens + reuse.moved_tokens + reuse.new_tokens == total
        assert reuse.computed_by_layer == (reuse.computed_tokens,) * 3
        assert 16 <= reuse.computed_tokens < 0.3 * total
        assert reuse.seconds_saved is not None
        assert 0 < reuse.seconds_to_find < reuse.seconds_to_read
        assert reuse.estimated_error is not None
        assert reuse.estimated_error > 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            reuse.kind = "none"

    def test_seconds_to_first_token_hold_all_costs(self, lm: LongContextLM, text: str) -> None:
        for _ in range(2):
            out = lm.generate(text, max_new_tokens=2)
            assert out.reuse.seconds_to_read == out.stats.seconds_to_first_token


class TestWays:
    """Whatever it is asked for: batches, chats, streams, documents."""

    def test_batches(self, lm: LongContextLM, off: LongContextLM, text: str, parts: list[str]) -> None:
        lm.generate(text, max_new_tokens=2)
        prompts = [text, parts[9], text + parts[8], text, "".join(parts[10:14])]
        ours, want = (each.generate(prompts, max_new_tokens=NEW_TOKENS) for each in (lm, off))
        assert [each.reuse.kind for each in ours] == ["same", "none", "prefix", "same", "none"]
        assert [each.token_ids for each in ours] == [each.token_ids for each in want]
        again = lm.generate(prompts, max_new_tokens=NEW_TOKENS)
        assert [each.reuse.kind for each in again] == ["same"] * 5
        assert [each.token_ids for each in again] == [each.token_ids for each in want]

    def test_prompts_of_a_batch_serve_one_another(
        self, lm: LongContextLM, off: LongContextLM, text: str, parts: list[str]
    ) -> None:
        """As a question each about one text is asked; and each says how long it took by itself."""
        prompts = [text + part for part in parts[8:11]]
        ours, want = (each.generate(prompts, max_new_tokens=NEW_TOKENS) for each in (lm, off))
        assert [each.reuse.kind for each in ours] == ["none", "prefix", "prefix"]
        assert [each.token_ids for each in ours] == [each.token_ids for each in want]
        seconds = [each.reuse.seconds_to_read for each in ours]
        assert sum(seconds) < ours[0].stats.seconds_to_first_token
        assert len({*seconds}) == 3

    def test_one_prompt_twice_in_a_batch(self, lm: LongContextLM, off: LongContextLM, text: str) -> None:
        ours, want = (each.generate([text, text], max_new_tokens=NEW_TOKENS) for each in (lm, off))
        assert [each.token_ids for each in ours] == [each.token_ids for each in want]
        assert statistics(lm).entries == 1

    def test_chats(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        """A turn more begins as the chat before it did."""
        chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<begin>")
        chatty.chat_template = TEMPLATE
        off, lm = make_lm(chatty), make_lm(chatty, reuse="exact")
        messages = [{"role": "user", "content": text}]
        for kind in ("none", "same", "prefix"):
            out = lm.generate(messages, max_new_tokens=NEW_TOKENS)
            assert out.reuse.kind == kind
            assert out.token_ids == tokens_of(off, messages)
            if kind == "same":
                messages += [{"role": "assistant", "content": "So it is."}, {"role": "user", "content": "Who was it?"}]
        with lm.read(text) as document, off.read(text) as want:
            assert document.reuse is not None
            assert document.reuse.kind == "prefix"
            assert [
                document.ask("Who?", max_new_tokens=6).token_ids,
                document.chat().ask("A?", max_new_tokens=6).token_ids,
            ] == [
                want.ask("Who?", max_new_tokens=6).token_ids,
                want.chat().ask("A?", max_new_tokens=6).token_ids,
            ]

    def test_streams(self, lm: LongContextLM, off: LongContextLM, text: str, parts: list[str]) -> None:
        """One that is given up half-way leaves the cache as it was; one that ends is like the whole answer."""
        for prompt in (text, text, text + parts[9]):
            before = statistics(lm)
            stream = lm.stream(prompt, max_new_tokens=NEW_TOKENS)
            next(stream)
            del stream
            after = statistics(lm)
            assert (after.entries, after.host_bytes) == (before.entries, before.host_bytes)
            assert lm.host_bytes_in_use == after.host_bytes
            stream = lm.stream(prompt, max_new_tokens=NEW_TOKENS)
            generation = stream.drain()
            assert generation.token_ids == tokens_of(off, prompt)
            assert generation.reuse is not None
        assert statistics(lm).entries == 2

    def test_streams_side_by_side(self, lm: LongContextLM, off: LongContextLM, text: str, parts: list[str]) -> None:
        """What one reads stays while others make it leave the cache."""
        lm.generate(text, max_new_tokens=2)
        prompts = [text + parts[9], text, text + parts[8]]
        streams = [lm.stream(prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]
        for stream in streams:
            next(stream)
        lm._engine.prompt_cache.catalog.clear("default")
        for stream, prompt in zip(streams, prompts, strict=True):
            assert stream.drain().token_ids == tokens_of(off, prompt)
        assert lm.generate(prompts[2], max_new_tokens=2).reuse.kind == "same"

    def test_a_stream_that_outlives_the_cache(self, lm: LongContextLM, off: LongContextLM, text: str) -> None:
        """Its answer is not lost."""
        for _ in range(2):
            stream = lm.stream(text, max_new_tokens=NEW_TOKENS)
            next(stream)
            lm.close()
            assert stream.drain().token_ids == tokens_of(off, text)
            lm.generate(text, max_new_tokens=2)

    def test_documents(
        self, lm: LongContextLM, off: LongContextLM, text: str, moved: str, parts: list[str], tmp_path: Path
    ) -> None:
        """Asked, continued, saved and opened, forked, adopted: as one that was read in full."""
        question = {"question": "What did the captain find?", "max_new_tokens": NEW_TOKENS}
        other = lm.with_config(policy="moments", reuse="off")
        for prompt, kind in ((text, "none"), (text, "same"), (text + parts[9], "prefix"), (moved, "similar")):
            document = lm.read(prompt)
            assert document.reuse is not None
            assert document.reuse.kind == kind
            assert document.reuse.seconds_to_read == document.seconds_to_read
            first = document.ask(**question).token_ids
            document.append(parts[12])
            second = document.ask(**question).token_ids
            if kind != "similar":
                with off.read(prompt) as want:
                    assert want.reuse is None
                    assert want.ask(**question).token_ids == first
                    want.append(parts[12])
                    assert want.ask(**question).token_ids == second
            if kind == "similar":
                with pytest.raises(ValueError, match="is an approximation made from a similar text"):
                    document.save(tmp_path / kind)
            else:
                document.save(tmp_path / kind)
                opened = lm.open(tmp_path / kind)
                assert opened.reuse is None
                assert opened.ask(**question).token_ids == second
            fork = document.fork()
            assert fork.reuse == document.reuse
            assert fork.ask(**question).token_ids == second
            with other.adopt(document) as adopted, other.read(prompt) as want:
                assert adopted.reuse == document.reuse
                want.append(parts[12])
                if kind != "similar":
                    assert adopted.ask(**question).token_ids == want.ask(**question).token_ids
            document.close()
            assert lm.read(prompt).reuse.kind == "same", "what was appended is no part of it"

    def test_a_document_that_moved_to_disk(
        self, tokenizer: PreTrainedTokenizerFast, off: LongContextLM, text: str, parts: list[str], tmp_path: Path
    ) -> None:
        """With the rows that a cached prompt shares with it: both come back."""
        lm = make_lm(tokenizer, reuse="exact", spill_folder=str(tmp_path))
        document = lm.read(text)
        want = document.ask("Who?", max_new_tokens=NEW_TOKENS).token_ids
        before = lm.host_bytes_in_use
        document.move_to_disk(tmp_path)
        assert lm.host_bytes_in_use < 0.2 * before
        assert statistics(lm).host_bytes == lm.host_bytes_in_use
        for prompt, kind in ((text, "same"), (text + parts[9], "prefix")):
            out = lm.generate(prompt, max_new_tokens=NEW_TOKENS)
            assert out.reuse.kind == kind
            assert out.token_ids == tokens_of(off, prompt)
        assert document.ask("Who?", max_new_tokens=NEW_TOKENS).token_ids == want

    def test_progress(self, lm: LongContextLM, text: str, moved: str, parts: list[str]) -> None:
        """Rises to the number of tokens, of all prompts together, however much is reused."""
        for prompt in (text, text, text + parts[9], moved, [text, parts[11] + parts[12], moved]):
            seen: list[tuple[int, int]] = []
            lm.generate(prompt, max_new_tokens=1, progress=lambda done, total, seen=seen: seen.append((done, total)))
            total = sum(len(lm.tokenizer(each).input_ids) for each in ([prompt] if isinstance(prompt, str) else prompt))
            assert seen[-1] == (total, total)
            assert [done for done, _ in seen] == sorted({done for done, _ in seen})
            assert {of for _, of in seen} == {total}

    def test_a_reading_that_is_broken_off(self, lm: LongContextLM, off: LongContextLM, text: str) -> None:
        class EnoughError(Exception):
            pass

        def stop(done: int, total: int) -> None:
            if done > 300:
                raise EnoughError

        for _ in range(2):
            with pytest.raises(EnoughError):
                lm.read(text, progress=stop)
        assert statistics(lm).entries == 0
        assert lm.host_bytes_in_use == 0
        assert tokens_of(lm, text) == tokens_of(off, text)


class TestNamespaces:
    def test_nothing_is_found_or_counted_across(self, lm: LongContextLM, text: str, moved: str) -> None:
        lm.generate(text, max_new_tokens=2, namespace="a")
        before = statistics(lm, "a")
        for namespace in ("b", "a ", "default"):
            for prompt in (text, moved, text + " And so on."):
                assert lm.generate(prompt, max_new_tokens=2, namespace=namespace).reuse.kind != "same"
            assert statistics(lm, namespace).entries == 3
        assert lm.generate(moved, max_new_tokens=2, namespace="c").reuse.reason == "nothing like it is cached"
        assert statistics(lm, "a") == before
        assert lm.generate(text, max_new_tokens=2, namespace="a").reuse.kind == "same"

    def test_all_calls_take_one(self, lm: LongContextLM, text: str) -> None:
        assert lm.read(text, namespace="a").reuse.kind == "none"
        assert lm.stream(text, namespace="b", max_new_tokens=1).drain().reuse.kind == "none"
        assert lm.generate([text], namespace="a", max_new_tokens=1)[0].reuse.kind == "same"
        assert lm.read([text], namespace="b")[0].reuse.kind == "same"

    def test_forgetting(self, tokenizer: PreTrainedTokenizerFast, text: str, parts: list[str], tmp_path: Path) -> None:
        """One namespace, in memory and in files; another's stay."""
        lm = make_lm(tokenizer, reuse="exact", reuse_folder=str(tmp_path))
        for namespace in ("a", "b"):
            lm.generate(text, max_new_tokens=1, namespace=namespace)
        lm.generate(parts[9], max_new_tokens=1, namespace="a")
        lm.close()
        assert lm.forget("a") == 2
        assert lm.forget("a") == 0
        assert len([*tmp_path.glob("namespaces/*/*")]) == 1
        kinds = [lm.generate(text, max_new_tokens=1, namespace=namespace).reuse.kind for namespace in ("a", "b")]
        assert kinds == ["none", "same"]
        lm.close()
        assert make_lm(tokenizer).forget() == 0

    def test_errors_do_not_say_what_others_read(
        self, tokenizer: PreTrainedTokenizerFast, text: str, parts: list[str], off: LongContextLM
    ) -> None:
        with off.read(text) as document:
            size = document.kv_host_bytes
            assert text[:8] in document.name
        lm = make_lm(tokenizer, reuse="exact", host_memory_bytes=int(1.2 * size))
        document = lm.read(text, namespace="a")
        with pytest.raises(MemoryError, match=r"cached prompts holds .* \(a document of [\d,]+ tokens ") as error:
            lm.read("".join(parts[5:10]), namespace="b")
        assert text[:8] not in str(error.value)
        document.close()

    @pytest.mark.parametrize("bad", ["", None, 7, "half of a pair \ud800"], ids=ascii)
    def test_bad_names(self, bad: Any, lm: LongContextLM, off: LongContextLM, text: str) -> None:
        for each in (lm, off):
            for call in (each.generate, each.read, each.stream):
                with pytest.raises(ValueError, match="namespace must be a non-empty string of whole characters, got"):
                    call(text, namespace=bad)


class TestFolder:
    def test_the_next_process_finds_it(
        self, tokenizer: PreTrainedTokenizerFast, text: str, moved: str, parts: list[str], tmp_path: Path
    ) -> None:
        """The same prompt, exact or approximate, gives the same answer; others begin as cached ones do."""
        settings = {"reuse": "similar", "reuse_folder": str(tmp_path)}
        lm = make_lm(tokenizer, **settings)
        want = {prompt: lm.generate(prompt, max_new_tokens=NEW_TOKENS, logprobs=True) for prompt in (text, moved)}
        lm.close()
        assert lm.host_bytes_in_use == 0
        again = make_lm(tokenizer, **settings)
        for prompt, wanted in want.items():
            out = again.generate(prompt, max_new_tokens=NEW_TOKENS, logprobs=True)
            assert out.reuse.kind == "same"
            assert out.reuse.approximate == wanted.reuse.approximate
            assert out.token_ids == wanted.token_ids
            assert out.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert again.generate(text + parts[9], max_new_tokens=2).reuse.kind == "prefix"
        again.close()

    def test_other_settings_may_use_it(
        self, tokenizer: PreTrainedTokenizerFast, text: str, parts: list[str], tmp_path: Path
    ) -> None:
        """KV does not depend on how sentences are cut and chosen."""
        lm = make_lm(tokenizer, reuse="exact", reuse_folder=str(tmp_path))
        lm.generate(text, max_new_tokens=2)
        lm.close()
        changes = {"max_sentence_tokens": 9, "sink_tokens": 2, "window_tokens": 20, "policy": "moments"}
        off = make_lm(tokenizer, **changes)
        for prompt, kind in ((text, "same"), (text + parts[9], "prefix")):
            other = off.with_config(reuse="exact", reuse_folder=str(tmp_path))
            out = other.generate(prompt, max_new_tokens=NEW_TOKENS)
            other.close()
            assert out.reuse.kind == kind
            assert out.token_ids == tokens_of(off, prompt)

    def test_another_models_is_refused(self, tokenizer: PreTrainedTokenizerFast, text: str, tmp_path: Path) -> None:
        """Other weights, another dtype, other frequencies; and the folder stays as it was."""
        settings = {**SMALL, "reuse": "exact", "reuse_folder": str(tmp_path)}
        lm = LongContextLM.from_model(make_model("llama"), tokenizer, **settings)
        lm.generate(text, max_new_tokens=2)
        with pytest.raises(CatalogError, match="is open already"):
            LongContextLM.from_model(make_model("llama"), tokenizer, **settings).generate(text, max_new_tokens=2)
        lm.close()
        others = (
            make_model("llama", seed=1),
            make_model("llama").bfloat16(),
            make_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        )
        for model in others:
            with pytest.raises(CatalogError, match=r"belongs to .* use another folder"):
                LongContextLM.from_model(model, tokenizer, **settings).generate(text, max_new_tokens=2)
        assert lm.generate(text, max_new_tokens=2).reuse.kind == "same"
        lm.close()

    def test_closing(self, lm: LongContextLM, off: LongContextLM, text: str) -> None:
        """Gives all memory back, twice if need be; what is asked afterwards starts anew. Documents stay."""
        document = lm.read(text)
        lm.close()
        lm.close()
        assert lm.host_bytes_in_use == document.kv_host_bytes
        want = off.read(text).ask("Who?", max_new_tokens=4).token_ids
        assert document.ask("Who?", max_new_tokens=4).token_ids == want
        document.close()
        assert lm.host_bytes_in_use == 0
        assert lm.generate(text, max_new_tokens=2).reuse.kind == "none"
        off.close()


class TestMemory:
    """However little there is, what can be read without a cache can be read with one."""

    @pytest.fixture(scope="class")
    @classmethod
    def size(cls, off: LongContextLM, text: str) -> int:
        with off.read(text) as document:
            return document.kv_host_bytes

    def test_few_bytes_for_the_cache(
        self, tokenizer: PreTrainedTokenizerFast, off: LongContextLM, parts: list[str], size: int
    ) -> None:
        lm = make_lm(tokenizer, reuse="exact", reuse_bytes=int(1.5 * size))
        prompts = ["".join(parts[start : start + 5]) for start in (0, 5, 10)]
        want = [tokens_of(off, prompt) for prompt in prompts]
        for prompt, wanted in [*zip(prompts, want, strict=True)] * 2:
            assert tokens_of(lm, prompt) == wanted
            assert statistics(lm).host_bytes <= 1.5 * size
            assert lm.generate(prompt, max_new_tokens=1).reuse.kind == "same"
        assert statistics(lm).entries == 1

    @pytest.mark.parametrize("folder", [False, True])
    @pytest.mark.parametrize("sizes", [1.3, 1.6, 2.1, 2.6])
    def test_little_host_memory(
        self,
        sizes: float,
        folder: bool,
        tokenizer: PreTrainedTokenizerFast,
        off: LongContextLM,
        parts: list[str],
        size: int,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.CRITICAL)  # what cannot be cached is said each time
        lm = make_lm(
            tokenizer,
            reuse="exact",
            reuse_bytes=9 * size,
            host_memory_bytes=int(sizes * size),
            reuse_folder=str(tmp_path) if folder else None,
        )
        prompts = ["".join(parts[start : start + 5]) for start in (0, 5)]
        want = [tokens_of(off, prompt) for prompt in prompts]
        for i in (0, 1, 0, 1, 1):
            assert tokens_of(lm, prompts[i]) == want[i]
            assert lm.host_bytes_in_use <= sizes * size
        lm.close()

    @pytest.mark.parametrize("sizes", [2.3, 2.6, 2.9, 3.2, 3.6])
    def test_documents_come_before_cached_prompts(
        self, sizes: float, tokenizer: PreTrainedTokenizerFast, off: LongContextLM, parts: list[str], size: int
    ) -> None:
        """Two that fit, with prompts cached before, between and of them."""
        lm = make_lm(tokenizer, reuse="exact", reuse_bytes=9 * size, host_memory_bytes=int(sizes * size))
        texts = ["".join(parts[start : start + 5]) for start in (0, 5, 10)]
        lm.generate(texts[0], max_new_tokens=1)
        first = lm.read(texts[1])
        lm.generate(texts[0], max_new_tokens=1)
        second = lm.read(texts[2])
        for document, text in ((first, texts[1]), (second, texts[2])):
            want = off.read(text).ask("Who?", max_new_tokens=4).token_ids
            assert document.ask("Who?", max_new_tokens=4).token_ids == want

    def test_rows_that_are_in_a_documents_file(
        self, tokenizer: PreTrainedTokenizerFast, off: LongContextLM, text: str, size: int, tmp_path: Path
    ) -> None:
        """A cached prompt shares them, and has no room to come back and be written: it is lost, nothing else is."""
        kept, spilled = (tmp_path / name for name in ("kept", "spilled"))
        spilled.mkdir()
        lm = make_lm(tokenizer, reuse="exact", reuse_folder=str(kept), reuse_bytes=9 * size)
        document = lm.read(text)
        document.move_to_disk(spilled)
        lm._engine.memory.limit_bytes = int(1.5 * size)
        other = text[:700]
        assert lm.generate(other, max_new_tokens=NEW_TOKENS, namespace="b").token_ids == tokens_of(off, other)
        lm._engine.memory.limit_bytes = int(0.5 * size)
        lm.close()
        lm._engine.memory.limit_bytes = None
        want = off.read(text).ask("Who?", max_new_tokens=4).token_ids
        assert document.ask("Who?", max_new_tokens=4).token_ids == want

    def test_answers_are_not_kept(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        """However long: a cached prompt is its own KV, and the next one begins with that."""
        held = []
        for new_tokens in (1, 400):
            lm = make_lm(tokenizer, reuse="exact")
            assert len(lm.generate(text[:500], max_new_tokens=new_tokens).token_ids) == new_tokens
            held.append(statistics(lm).host_bytes)
            assert lm.generate(text[:500], max_new_tokens=2).reuse.kind == "same"
        assert held[1] < 1.3 * held[0]

    @pytest.mark.parametrize("sizes", [2.3, 2.5, 2.8])
    def test_a_reused_document_needs_no_more(
        self, sizes: float, tokenizer: PreTrainedTokenizerFast, off: LongContextLM, parts: list[str], size: int
    ) -> None:
        """Its rows are in host memory already: they are not counted once more when something is asked."""
        lm = make_lm(tokenizer, reuse="exact", reuse_bytes=9 * size, host_memory_bytes=int(sizes * size))
        text, other = ("".join(parts[start : start + 5]) for start in (0, 5))
        lm.read(text).close()
        document = lm.read(text)
        assert document.reuse.kind == "same"
        assert document.can_move
        assert document.kv_host_bytes == pytest.approx(size, rel=0.3)
        lm.read(other)
        want = off.read(text).ask("Who?", max_new_tokens=4).token_ids
        assert document.ask("Who?", max_new_tokens=4).token_ids == want
        assert statistics(lm).entries >= 1


class TestSettings:
    @pytest.mark.parametrize("architecture", ["gemma3_text", "cohere2", "olmo3"])
    def test_sliding_windows(self, architecture: str, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        """Are refused, with what to do instead."""
        model = make_model(architecture)
        with pytest.raises(UnsupportedModelError, match=r"sliding-window layers.* use reuse='off'"):
            LongContextLM.from_model(model, tokenizer, reuse="exact", **SMALL).generate(text, max_new_tokens=1)

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({"reuse": "all"}, ValueError, "reuse must be 'off', 'exact' or 'similar', got 'all'"),
            ({"reuse": "exact", "kv_dtype": "int8"}, ValueError, "reuse='exact' needs kv_dtype='auto', got 'int8'"),
            ({"reuse_options": {"rato": 1}}, TypeError, "unknown reuse option 'rato'; there are: first_tokens, "),
            ({"reuse_options": {"ratio": 7}}, ValueError, "ratio must be from 0 to 1"),
            ({"reuse_options": {"score": "best"}}, ValueError, "score must be one of value_deviation"),
            ({"reuse_options": [1]}, TypeError, "reuse_options must be a mapping, got list"),
            ({"reuse_bytes": 0}, ValueError, "reuse_bytes must be at least 1, got 0"),
            ({"reuse_disk_bytes": 0.5}, TypeError, "reuse_disk_bytes must be a whole number, got 0.5"),
            ({"reuse_namespace_bytes": -1}, ValueError, "reuse_namespace_bytes must be at least 1, got -1"),
            ({"reuse_folder": 5}, TypeError, "reuse_folder must be a path or None, got int"),
            ({"reuse_folder": __file__}, ValueError, "reuse_folder must be a directory, and .* is not"),
            ({"reuse_embedding": "mean"}, TypeError, "reuse_embedding must be callable or None, got str"),
            ({"reuze": "exact"}, TypeError, "unknown setting 'reuze'"),
        ],
    )
    def test_mistakes_are_known_before_the_model_is_loaded(
        self, given: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            LongContextLM.from_pretrained("./no/model/is/here", **given)

    def test_quotas(self, tokenizer: PreTrainedTokenizerFast, text: str, parts: list[str], tmp_path: Path) -> None:
        """Of each namespace, in memory and in files, and of all files."""
        one = make_lm(tokenizer, reuse="exact")
        one.generate(text, max_new_tokens=1)
        size = statistics(one).host_bytes
        others = ["".join(parts[start : start + 5]) for start in (5, 10)]
        lm = make_lm(tokenizer, reuse="exact", reuse_folder=str(tmp_path), reuse_namespace_bytes=int(1.5 * size))
        lm.generate(others[0], max_new_tokens=1, namespace="b")
        for prompt in (text, *others):
            lm.generate(prompt, max_new_tokens=1)
            assert statistics(lm).host_bytes <= 1.5 * size
            assert statistics(lm).disk_bytes <= 1.5 * size
        assert statistics(lm, "b").entries == 1
        lm.close()
        lm = make_lm(tokenizer, reuse="exact", reuse_folder=str(tmp_path), reuse_disk_bytes=int(1.2 * size))
        lm.generate("He came.", max_new_tokens=1)
        held = [statistics(lm, namespace).disk_bytes for namespace in ("default", "b")]
        assert 0 < sum(held) <= 1.2 * size

    def test_an_embedding_that_knows_no_word(self, tokenizer: PreTrainedTokenizerFast, text: str, moved: str) -> None:
        """Prompts are found by their tokens all the same."""
        lm = make_lm(tokenizer, reuse="similar", reuse_embedding=lambda text: [0.0] * 8)
        for prompt, kind in ((text, "none"), (moved, "similar"), (text, "same")):
            assert lm.generate(prompt, max_new_tokens=1).reuse.kind == kind

    def test_other_options_make_other_approximations(
        self, tokenizer: PreTrainedTokenizerFast, text: str, moved: str, tmp_path: Path
    ) -> None:
        """What was made with worse ones is not given out as what these would give."""
        settings = {"reuse": "similar", "reuse_folder": str(tmp_path)}
        worse = make_lm(tokenizer, **settings, reuse_options={"first_tokens": 0, "rotate": False})
        worse.generate(text, max_new_tokens=1)
        bad = worse.generate(moved, max_new_tokens=1, logprobs=True)
        worse.close()
        lm = make_lm(tokenizer, **settings)
        out = lm.generate(moved, max_new_tokens=1, logprobs=True)
        assert (out.reuse.kind, bad.reuse.kind) == ("similar", "similar")
        assert abs(out.logprobs[0] - bad.logprobs[0]) > 1e-3
        assert lm.generate(moved, max_new_tokens=1).reuse.kind == "same"
        assert statistics(lm).approximate_entries == 1
        lm.close()

    def test_options_are_used(self, tokenizer: PreTrainedTokenizerFast, text: str, moved: str) -> None:
        computed = {}
        for first_tokens in (0, 5, 40):
            lm = make_lm(tokenizer, reuse="similar", reuse_options={"first_tokens": first_tokens})
            lm.generate(text, max_new_tokens=1)
            computed[first_tokens] = lm.generate(moved, max_new_tokens=1).reuse.recomputed_tokens
        assert computed[0] < computed[5] < computed[40]

    def test_an_embedding_of_ones_own(self, tokenizer: PreTrainedTokenizerFast, text: str, moved: str) -> None:
        texts: list[str] = []

        def embed(given: str) -> list[float]:
            texts.append(given)
            return [1.0, float(len(given)), 3.0]

        lm = make_lm(tokenizer, reuse="similar", reuse_embedding=embed)
        assert lm.generate(text, max_new_tokens=1).reuse.kind == "none"
        assert lm.generate(moved, max_new_tokens=1).reuse.kind == "similar"
        assert texts[-2:] == [text, moved]

    def test_off_is_off(self, off: LongContextLM, text: str) -> None:
        """No cache, no report, whatever else is set."""
        for _ in range(2):
            assert off.generate(text, max_new_tokens=1).reuse is None
        with off.read(text) as document:
            assert document.reuse is None
        assert off._engine.prompt_cache is None
        assert off.host_bytes_in_use == 0
