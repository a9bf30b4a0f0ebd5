"""Records as figures. Reads records and nothing else; needs the ``plots`` extra (matplotlib)."""

from ._style import require_plots
from .ablations import plot_ablations
from .audit import draw_audit
from .correspondence import plot_correspondence
from .steering import plot_static_dynamic
from .sweeps import plot_sweep, plot_variants
from .training import plot_training_curves
from .usage import plot_rank_frequencies

__all__ = [
    "draw_audit",
    "plot_ablations",
    "plot_correspondence",
    "plot_rank_frequencies",
    "plot_static_dynamic",
    "plot_sweep",
    "plot_training_curves",
    "plot_variants",
    "require_plots",
]
