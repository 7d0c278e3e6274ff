"""Documents in files: opened, they answer as before; what does not belong together is refused."""

import gc
import json
import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sentencekv import LongContextLM, SavedFileError, disk, policies
from tests.conftest import make_model

SMALL = {
    "budget_tokens": 96,
    "sink_tokens": 4,
    "window_tokens": 12,
    "max_sentence_tokens": 16,
    "min_sentence_tokens": 4,
    "prefill_chunk_tokens": 100,
}
QUESTION = "What did the captain find?"


def make_lm(tokenizer: PreTrainedTokenizerFast, architecture: str = "llama", **changes: object) -> LongContextLM:
    return LongContextLM.from_model(make_model(architecture), tokenizer, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def lm(tokenizer: PreTrainedTokenizerFast) -> LongContextLM:
    return make_lm(tokenizer)


@pytest.fixture(scope="module")
def saved(lm: LongContextLM, prose: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.skv"
    with lm.read(prose[:4000]) as document:
        document.save(path)
    return path


def answers(document) -> list:
    options = {"max_new_tokens": 24, "logprobs": True}
    found = [document.ask(QUESTION, **options), document.ask("Who?", **options), document.complete(**options)]
    return [(each.token_ids, each.logprobs, each.sources) for each in found]


@pytest.mark.parametrize("policy", policies.available())
def test_an_opened_document_answers_as_before(
    policy: str, tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path: Path
) -> None:
    """Bit for bit, from the file, from a file of the opened one, and with host memory that is just enough."""
    lm = make_lm(tokenizer, policy=policy, **policies.policy_class(policy).settings)
    document = lm.read(prose[:4000])
    seen: list[tuple[int, int]] = []
    size = document.save(tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert size == (tmp_path / "a").stat().st_size
    assert seen[-1][0] == seen[-1][1] < size
    expected = answers(document)
    held = document.kv_host_bytes
    opened = lm.open(tmp_path / "a")
    assert opened.kv_host_bytes == 0
    assert (opened.text, opened.num_tokens, opened.num_sentences) == (
        document.text,
        document.num_tokens,
        document.num_sentences,
    )
    opened.save(tmp_path / "b")
    again = lm.open(tmp_path / "b")
    (tmp_path / "b").unlink()  # what is open stays readable
    document.close()
    assert answers(opened) == expected
    assert answers(again) == expected
    assert again.kv_host_bytes == held


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8", "int4"])
def test_fewer_bits(kv_dtype: str, tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path: Path) -> None:
    """The file is smaller, its codes are those in host memory, and they mean nothing under another setting."""
    lm, whole = make_lm(tokenizer, kv_dtype=kv_dtype), make_lm(tokenizer)
    document = lm.read(prose[:4000])
    size = document.save(tmp_path / "a")
    assert size < 0.8 * whole.read(prose[:4000]).save(tmp_path / "b")
    assert document.kv_host_bytes < 0.6 * whole.read(prose[:4000]).kv_host_bytes
    opened = lm.open(tmp_path / "a")
    assert answers(opened) == answers(document)
    assert opened.kv_host_bytes == document.kv_host_bytes
    with pytest.raises(SavedFileError, match=f"was read under kv_dtype='{kv_dtype}'"):
        whole.open(tmp_path / "a")


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen2", "mistral"])
def test_other_architectures(architecture: str, tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path: Path) -> None:
    """Sliding-window layers have no sentences; their last tokens are in the file."""
    lm = make_lm(tokenizer, architecture)
    document = lm.read(prose[:1500])
    document.save(tmp_path / "a")
    assert answers(lm.open(tmp_path / "a")) == answers(document)


def test_a_text_shorter_than_the_window(lm: LongContextLM, tmp_path: Path) -> None:
    document = lm.read("A boat.")
    document.save(tmp_path / "a")
    assert answers(lm.open(tmp_path / "a")) == answers(document)


def test_a_document_on_a_gpu(tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path: Path, device) -> None:
    """Saved from pinned memory, opened into it."""
    model = make_model("llama").to(device)
    lm = LongContextLM.from_model(model, tokenizer, **SMALL)
    document = lm.read(prose[:4000])
    document.save(tmp_path / "a")
    assert answers(lm.open(tmp_path / "a")) == answers(document)


def test_chat_documents_keep_their_frame(tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path: Path) -> None:
    chatty = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<begin>")
    chatty.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
    lm = make_lm(chatty)
    document = lm.read(prose[:900])
    document.save(tmp_path / "a")
    opened = lm.open(tmp_path / "a")
    assert opened.text == prose[:900]
    assert answers(opened) == answers(document)


def test_a_file_of_another_model_is_refused(lm: LongContextLM, saved: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    other = LongContextLM.from_model(make_model("llama", seed=1), tokenizer, **SMALL)
    with pytest.raises(SavedFileError, match="was read by another model"):
        other.open(saved)
    turned = make_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with pytest.raises(SavedFileError, match="other rotary position embeddings"):
        LongContextLM.from_model(turned, tokenizer, **SMALL).open(saved)
    swapped = json.loads(tokenizer.backend_tokenizer.to_str())
    words = swapped["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(swapped)), bos_token="<begin>")
    with pytest.raises(SavedFileError, match="another tokenizer"):
        LongContextLM.from_model(make_model("llama"), words, **SMALL).open(saved)
    lm.open(saved)


def test_another_dtype_of_the_same_weights(tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path: Path) -> None:
    """Weights that are exact in both: the model is the same, its KV is not."""
    rounded = make_model("llama").bfloat16()
    LongContextLM.from_model(rounded, tokenizer, **SMALL).read(prose[:300]).save(tmp_path / "a")
    wide = LongContextLM.from_model(rounded.float(), tokenizer, **SMALL)
    with pytest.raises(SavedFileError, match=r"holds KV in bfloat16, the model is in float32; load it with dtype='bf"):
        wide.open(tmp_path / "a")


def test_other_settings_are_refused_with_the_remedy(lm: LongContextLM, saved: Path) -> None:
    other = lm.with_config(policy="moments", sink_tokens=8)
    remedy = r"lm\.with_config\(policy='codes', policy_options={'bits': 2}, sink_tokens=4\)"
    with pytest.raises(SavedFileError, match=remedy):
        other.open(saved)
    options = {"bits": 2, "group": "max"}
    other.with_config(policy="codes", policy_options=options, sink_tokens=4).open(saved)
    lm.with_config(policy_options={"bits": 2}).open(saved)  # the default, said aloud
    lm.with_config(budget_tokens=200, hot_tokens=400).open(saved).ask(QUESTION, max_new_tokens=4)


def test_damage_is_noticed_before_an_answer(lm: LongContextLM, saved: Path, tmp_path: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-100] ^= 4  # the KV of the last layer
    (tmp_path / "a").write_bytes(content)
    opened = lm.open(tmp_path / "a")
    for _ in range(2):
        with pytest.raises(SavedFileError, match=r"is damaged: extent0\.slab\d\.layer2 does not match its checksum"):
            opened.ask(QUESTION)
    (tmp_path / "a").write_bytes(content[:-1])
    with pytest.raises(SavedFileError, match="was the copy cut off"):
        lm.open(tmp_path / "a")
    with pytest.raises(SavedFileError, match="is not a document"):
        lm.open(Path(__file__))


def test_too_little_host_memory_is_known_before_reading(lm: LongContextLM, saved: Path) -> None:
    tight = lm.with_config(host_memory_bytes=400_000)
    opened = tight.open(saved)
    with pytest.raises(MemoryError, match="host_memory_bytes"):
        opened.ask(QUESTION)
    assert tight.host_bytes_in_use == 0
    roomy = lm.with_config(host_memory_bytes=4_000_000)
    opened = roomy.open(saved)
    expected = answers(opened)
    assert answers(opened) == expected
    opened.close()
    gc.collect()
    assert roomy.host_bytes_in_use == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sentencekv-read")]


def test_files_of_other_versions(lm: LongContextLM, tmp_path: Path) -> None:
    for kind, version, message in (
        ("sentencekv document", 99, "has version 99 of its format, and this release reads version 3"),
        ("sentencekv document", None, "has version None"),
        ("another", 1, "is not a document that sentencekv saved"),
    ):
        disk.write_file(tmp_path / "a", {"kind": kind, "version": version}, {})
        with pytest.raises(SavedFileError, match=message):
            lm.open(tmp_path / "a")


def test_a_closed_document_is_not_saved(lm: LongContextLM, tmp_path: Path) -> None:
    document = lm.read("A boat.")
    document.close()
    with pytest.raises(ValueError, match="closed"):
        document.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_comes_back(tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path: Path) -> None:
    lm = LongContextLM.from_model(make_model("llama").bfloat16(), tokenizer, **SMALL)
    document = lm.read(prose[:1500])
    document.save(tmp_path / "a")
    opened = lm.open(tmp_path / "a")
    for ours, theirs in zip(
        opened._contents.session._recent.values(), document._contents.session._recent.values(), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)
    assert answers(opened) == answers(document)


class TestSpill:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "spill").mkdir()
        return tmp_path / "spill"

    def test_documents_not_used_for_longest_move_to_disk(
        self, tokenizer: PreTrainedTokenizerFast, prose: str, folder: Path
    ) -> None:
        """Three documents where two fit: all of them answer as if all were in memory, whichever is asked."""
        texts = [prose[:3600], prose[3600:7200], prose[7200:10800]]
        roomy = make_lm(tokenizer)
        expected = [answers(roomy.read(text)) for text in texts]
        size = max(roomy.read(text).kv_host_bytes for text in texts)
        bound = int(2.8 * size)
        lm = make_lm(tokenizer, host_memory_bytes=bound, spill_folder=str(folder))
        documents = [lm.read(text) for text in texts[:2]]
        assert all(document.kv_host_bytes for document in documents)
        answers(documents[0])
        documents.append(lm.read(texts[2]))
        assert [document.kv_host_bytes > 0 for document in documents] == [True, False, True]
        for i in (1, 0, 2, 2, 1):
            assert answers(documents[i]) == expected[i]
            assert documents[i].kv_host_bytes
            gc.collect()
            assert lm.host_bytes_in_use <= bound
        assert list(folder.iterdir()) == [], "files have no name, so that a crash leaves none"
        conversation = documents[0].chat()
        conversation.ask(QUESTION, max_new_tokens=4)
        del documents, conversation
        gc.collect()
        assert lm.host_bytes_in_use == 0

    def test_what_is_in_use_stays(self, tokenizer: PreTrainedTokenizerFast, prose: str, folder: Path) -> None:
        size = make_lm(tokenizer).read(prose[:4000]).kv_host_bytes
        lm = make_lm(tokenizer, host_memory_bytes=int(1.9 * size), spill_folder=str(folder))
        document = lm.read(prose[:4000])
        expected = document.ask(QUESTION, max_new_tokens=16).token_ids
        stream = document.stream(QUESTION, max_new_tokens=16)
        next(stream)
        with pytest.raises(MemoryError, match=r"holds .* \('.*\.\.\.' [\d.]+ [KM]iB\): close documents"):
            lm.read(prose[4000:8000])
        assert stream.drain().token_ids == expected
        lm.read(prose[4000:8000])
        assert document.kv_host_bytes == 0
        assert document.ask(QUESTION, max_new_tokens=16).token_ids == expected

    def test_forks_and_conversations_outlive_the_move(
        self, tokenizer: PreTrainedTokenizerFast, prose: str, folder: Path
    ) -> None:
        """They share the slabs that move: what they were about to say, they say."""
        lm = make_lm(tokenizer, spill_folder=str(folder))
        document = lm.read(prose[:4000])
        expected = answers(document)
        first = lm.read(prose[:4000]).chat()
        said = [first.ask(question, max_new_tokens=20).token_ids for question in ("Who?", "When?")]
        fork, conversation = document.fork(), document.chat()
        assert conversation.ask("Who?", max_new_tokens=20).token_ids == said[0]
        document.move_to_disk(folder)
        assert document.kv_host_bytes == fork.kv_host_bytes == 0
        assert conversation.ask("When?", max_new_tokens=20).token_ids == said[1]
        assert answers(fork) == expected
        assert answers(document) == expected

    def test_what_a_conversation_reads_stays(
        self, tokenizer: PreTrainedTokenizerFast, prose: str, folder: Path
    ) -> None:
        """A stream of a conversation or a fork is as good a reason as one of the document itself."""
        size = make_lm(tokenizer).read(prose[:4000]).kv_host_bytes
        lm = make_lm(tokenizer, host_memory_bytes=int(1.9 * size), spill_folder=str(folder))
        lm._engine._stop_ids = set()
        document = lm.read(prose[:4000])
        expected = document.chat().ask("Who?", max_new_tokens=60).token_ids
        for asked in (document.chat(), document.fork()):
            stream = asked.stream("Who?", max_new_tokens=60)
            next(stream)
            with pytest.raises(MemoryError):
                lm.read(prose[4000:8000])
            assert document.kv_host_bytes
            assert stream.drain().token_ids == expected
        conversation = document.chat()
        del document, asked, stream
        lm.read(prose[4000:8000])  # the document is only held by the conversation, and moves
        assert conversation.ask("Who?", max_new_tokens=60).token_ids == expected

    def test_room_is_made_for_all_that_comes(
        self, tokenizer: PreTrainedTokenizerFast, prose: str, folder: Path
    ) -> None:
        """The document that comes back and the question's own sentences: one check, before anything is read."""
        roomy = make_lm(tokenizer)
        size = max(roomy.read(text).kv_host_bytes for text in (prose[:3600], prose[3600:7200]))
        lm = make_lm(tokenizer, host_memory_bytes=int(2.02 * size), spill_folder=str(folder))
        first, second = lm.read(prose[:3600]), lm.read(prose[3600:7200])
        first.move_to_disk(folder)
        question = prose[8000:8200]
        expected = roomy.read(prose[:3600]).ask(question, max_new_tokens=20).token_ids
        assert first.ask(question, max_new_tokens=20).token_ids == expected
        assert second.kv_host_bytes == 0

    def test_what_nobody_holds_is_not_brought_back(
        self, tokenizer: PreTrainedTokenizerFast, prose: str, folder: Path
    ) -> None:
        """A fork with more in it moved both; it is closed, and only the document's own comes back."""
        lm = make_lm(tokenizer, spill_folder=str(folder))
        document = lm.read(prose[:3600])
        expected, held = answers(document), document.kv_host_bytes
        fork = document.fork()
        fork.append(prose[3600:7200])
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        fork.move_to_disk(folder)
        fork.close()
        del fork
        assert answers(document) == expected
        gc.collect()
        assert lm.host_bytes_in_use == document.kv_host_bytes == held
        assert len(list(Path("/proc/self/fd").iterdir())) == open_files

    def test_a_folder_that_is_gone(self, tokenizer: PreTrainedTokenizerFast, prose: str, folder: Path) -> None:
        size = make_lm(tokenizer).read(prose[:4000]).kv_host_bytes
        lm = make_lm(tokenizer, host_memory_bytes=int(1.5 * size), spill_folder=str(folder))
        document = lm.read(prose[:4000])
        expected = answers(document)
        folder.rmdir()
        with pytest.raises(MemoryError, match="close documents") as caught:
            lm.read(prose[4000:8000])
        assert isinstance(caught.value.__cause__, FileNotFoundError)
        assert answers(document) == expected

    def test_a_full_disk_leaves_the_document(
        self, tokenizer: PreTrainedTokenizerFast, prose: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = make_lm(tokenizer, spill_folder=str(folder))
        document = lm.read(prose[:4000])
        held, expected = document.kv_host_bytes, answers(document)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: disk.shutil._ntuple_diskusage(10, 8, 2))
        with pytest.raises(OSError, match="2 B are free"):
            document.move_to_disk(folder)
        assert document.kv_host_bytes == held
        assert answers(document) == expected

    def test_the_folder_must_exist(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="spill_folder must be a directory that exists"):
            make_lm(tokenizer, spill_folder=str(tmp_path / "no"))


def test_options_of_reading_may_differ(tokenizer: PreTrainedTokenizerFast, prose: str, tmp_path: Path) -> None:
    """What is kept of a document does not depend on how sentences are chosen and read."""
    lm = make_lm(tokenizer)
    lm.read(prose[:4000]).save(tmp_path / "a")
    others = [lm.with_config(policy_options={"rest": 0}), lm.with_config(policy_options={"group": "mean"})]
    answered = [answers(each.open(tmp_path / "a")) for each in others]
    assert answered == [answers(each.read(prose[:4000])) for each in others]
    with pytest.raises(SavedFileError, match="policy_options"):
        lm.with_config(policy_options={"bits": 4}).open(tmp_path / "a")
