"""The steps of sparse decoding, one file each: a plain PyTorch reference, which is the specification, and the op.

Every file has `<op>_ref` and `<op>`; callers use `<op>`. Imports torch only, knows nothing of models, sessions or
policies. Shape letters: `N` KV heads, `G` query heads per KV head, `H` head dimension, `S` sentences, `K` selected
sentences (padded with -1), `C` hot-set slots, `M` tokens in a slot (`max_sentence_tokens`), `R` recent tokens.

The order within one layer of one step: `score_sentences` or `score_codes`, `group_scores`, `select_sentences`,
`resolve_hot_set`, `gather_kv`, `sparse_decode`. `summarize` and `encode_keys` run when sentences are closed.
"""

from triton_ops.encode_keys import encode_keys
from triton_ops.gather_kv import gather_kv
from triton_ops.resolve_hot_set import HotSetState, Resolved, resolve_hot_set
from triton_ops.score_codes import score_codes
from triton_ops.score_sentences import group_scores, score_sentences
from triton_ops.select_sentences import select_sentences
from triton_ops.sparse_decode import SparseDecoded, sparse_decode
from triton_ops.summarize import summarize

__all__ = [
    "HotSetState",
    "Resolved",
    "SparseDecoded",
    "encode_keys",
    "gather_kv",
    "group_scores",
    "resolve_hot_set",
    "score_codes",
    "score_sentences",
    "select_sentences",
    "sparse_decode",
    "summarize",
]
