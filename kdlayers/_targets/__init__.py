"""What the teacher says the scores should be: codebooks, decisions, and their fits.

It imports `functional`, `_utils` and `errors`; `losses` and the rooms above import it.
"""

from kdlayers._targets.base import TemplateTargets as TemplateTargets
from kdlayers._targets.base import divergence_from as divergence_from
from kdlayers._targets.base import scores_of as scores_of
from kdlayers._targets.codebook import CodebookTargets as CodebookTargets
from kdlayers._targets.decisions import DecisionTargets as DecisionTargets
