"""Says where the kernels live: beside this package in a checkout, inside it once installed.

The folder has no `__init__.py` and is never importable as top-level `kernels`: transformers imports the Hugging Face
package of that name, and a package in the working directory would hide it.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(d) for d in (_here / "kernels", _here.parent / "kernels") if (d / "fused_loss.py").exists()][:1]
