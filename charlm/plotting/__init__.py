"""Pictures of trainings and models, drawn with matplotlib (the extra "plot"), which is imported when needed.

A function draws on the given axes and returns them. Without axes, it makes a new figure that is not
registered with pyplot. No setting of matplotlib is changed. Lines differ in style and markers, and cells of
tables in lightness, so a print in black and white is readable, too.
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
