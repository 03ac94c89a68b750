"""Shows what KD layers match, what they add to the features, and how often.

Functions that compute take models and return tensors; they need only torch (:func:`overlay` also
torchvision). Functions whose names begin with ``plot_`` draw these tensors and return a
``matplotlib.figure.Figure`` (``figure.savefig("matches.png")``). They need matplotlib, which
the extra ``viz`` installs. No other folder imports this one.
"""

from kdlayers.viz._figures import plot_matches as plot_matches
from kdlayers.viz._figures import plot_usage as plot_usage
from kdlayers.viz._overlay import overlay as overlay
from kdlayers.viz._overlay import template_colors as template_colors
from kdlayers.viz._pairs import Pair as Pair
from kdlayers.viz._pairs import class_decisions as class_decisions
from kdlayers.viz._pairs import strongest_pairs as strongest_pairs
from kdlayers.viz._tables import plot_decisions as plot_decisions
from kdlayers.viz._tables import plot_relations as plot_relations
from kdlayers.viz._usage import TemplateUsage as TemplateUsage
from kdlayers.viz._usage import template_usage as template_usage
from kdlayers.viz._view import LayerView as LayerView
from kdlayers.viz._view import feature_colors as feature_colors
from kdlayers.viz._view import layer_view as layer_view
from kdlayers.viz._view import match_map as match_map
from kdlayers.viz._view import norm_maps as norm_maps
