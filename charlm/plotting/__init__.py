"""Pictures of trainings and models, drawn with matplotlib (the extra "plot"), imported when one is drawn.

A function draws on the axes that it is given and returns them; without any it makes a figure of its own, of
which pyplot does not know. No setting of matplotlib is changed. Lines differ in style and markers, tables in
lightness, so a print in black and white says the same.
"""

from charlm.plotting.curves import plot_learning_rate, plot_loss, plot_run, plot_runs, plot_speed
from charlm.plotting.figures import save_picture
from charlm.plotting.labels import token_labels
from charlm.plotting.tables import plot_attention, plot_bigram

__all__ = [
    "plot_attention",
    "plot_bigram",
    "plot_learning_rate",
    "plot_loss",
    "plot_run",
    "plot_runs",
    "plot_speed",
    "save_picture",
    "token_labels",
]
