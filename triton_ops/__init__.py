"""The steps of sparse decoding, one file each: a plain PyTorch reference, which is the specification, and a kernel.

Every file has `<op>_ref`, the specification, `<op>_triton`, which launches the kernel, and `<op>`, which takes the
kernel for tensors on a GPU and the reference for others. Imports torch and triton only, knows nothing of models,
sessions or policies. Shape letters: `B` lanes, `A` query heads, `N` KV heads, `G` query heads per KV head, `H` head
dimension, `S` sentences, `K` selected sentences (padded with -1), `C` hot-set slots, `M` tokens in a slot
(`max_sentence_tokens`), `R` rows of resident tokens, `D` layers that retrieve.

The order within one layer of one step: `score_sentences` or `score_codes`, `select_sentences`, `resolve_hot_set`,
`sparse_decode`, and before it `gather_kv` where host memory holds codes. `summarize`, `encode_keys` and `offload_kv`
run when sentences are closed, `merge_attention` while a text is read, `positional_attention` where only some of its
tokens are computed. `lanes` says where kernels find what belongs to a sequence. `draw_greedy` ends a step.
"""

from triton_ops.draw_greedy import draw_greedy
from triton_ops.encode_keys import encode_keys
from triton_ops.gather_kv import gather_kv
from triton_ops.lanes import Lane, Lanes, Part
from triton_ops.merge_attention import merge_attention
from triton_ops.offload_kv import offload_kv
from triton_ops.pack_box import pack_box, unpack_box
from triton_ops.pack_kv import Format, Packed, pack_kv, packed_slab, unpack_kv
from triton_ops.positional_attention import positional_attention
from triton_ops.resident_mass import Beside
from triton_ops.resolve_hot_set import Resolved, resolve_hot_set
from triton_ops.score_codes import score_codes
from triton_ops.score_sentences import Scores, score_sentences
from triton_ops.select_sentences import select_sentences
from triton_ops.sparse_decode import sparse_decode
from triton_ops.summarize import summarize
from triton_ops.token_signatures import token_signatures

__all__ = [
    "Beside",
    "Format",
    "Lane",
    "Lanes",
    "Packed",
    "Part",
    "Resolved",
    "Scores",
    "draw_greedy",
    "encode_keys",
    "gather_kv",
    "merge_attention",
    "offload_kv",
    "pack_box",
    "pack_kv",
    "packed_slab",
    "positional_attention",
    "resolve_hot_set",
    "score_codes",
    "score_sentences",
    "select_sentences",
    "sparse_decode",
    "summarize",
    "token_signatures",
    "unpack_box",
    "unpack_kv",
]
