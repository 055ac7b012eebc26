"""GPU kernels for sweeps of interventions, each beside the plain torch arithmetic it must reproduce.

- `suffix_attention`: attention of packed rows that share all they have not changed with the base run of their prompt.
- `append_rows`: patch-and-append; new rows are written behind the old ones, from the base run or a patch.
- `answer_logits`: the final norm and one answer direction per row, without logits in between.
- `Graphed`: a function replayed as a CUDA graph wherever shapes repeat.

Tensors on a CUDA device go to Triton, all others to torch. Triton is imported by the first call that needs it, so this
package imports anywhere; no kernel has a backward.
"""

from interp_kernels.answer_logits import answer_logits
from interp_kernels.append_rows import append_rows
from interp_kernels.graphs import Graphed
from interp_kernels.suffix_attention import Rows, suffix_attention

__all__ = ["Graphed", "Rows", "answer_logits", "append_rows", "suffix_attention"]
