"""GPU kernels for sweeps of interventions, each beside the plain torch arithmetic it must reproduce.

- `suffix_attention`: attention of packed rows that share all they have not changed with the base run of their prompt.
- `append_rows`: patch-and-append; new rows are written behind the old ones, from the base run or a patch.
- `answer_logits`: the final norm and one answer direction per row, without logits in between.
- `row_top_k`: the k largest values of every row and their columns, without a sort.
- `afa_select`: of every row, as many of the largest energies as bring its norm nearest to a target.
- `sparse_decode`, `sparse_dots`: a sparse code decoded, less its target if wished, and the gradient of its values.
- `weight_gradients`, `by_latent`: a sparse autoencoder's weight gradients, gathered latent by latent in one pass.
- `adam_rows`: one pass for an Adam step of rows that stay on the unit sphere, and their copy in half precision.
- `unembed_top_k`: the k tokens that rows score highest, through tiles of the unembedding, without logits in between.
- `Graphed`: a function replayed as a CUDA graph wherever shapes repeat.

Tensors on a CUDA device go to Triton, all others to torch. Triton is imported by the first call that needs it, so this
package imports anywhere; no kernel has a backward.
"""

from interp_kernels.adam_rows import adam_rows
from interp_kernels.afa_select import afa_select
from interp_kernels.answer_logits import answer_logits
from interp_kernels.append_rows import append_rows
from interp_kernels.graphs import Graphed
from interp_kernels.row_top_k import row_top_k
from interp_kernels.sparse_decode import sparse_decode, sparse_dots
from interp_kernels.suffix_attention import Rows, suffix_attention
from interp_kernels.unembed_top_k import TopTokens, unembed_top_k
from interp_kernels.weight_gradients import by_latent, weight_gradients

__all__ = [
    "Graphed",
    "Rows",
    "TopTokens",
    "adam_rows",
    "afa_select",
    "answer_logits",
    "append_rows",
    "by_latent",
    "row_top_k",
    "sparse_decode",
    "sparse_dots",
    "suffix_attention",
    "unembed_top_k",
    "weight_gradients",
]
