"""What the teacher says the scores should be."""

from kdlayers._targets._base import TemplateTargets as TemplateTargets
from kdlayers._targets._base import divergence_from as divergence_from
from kdlayers._targets._base import scores_of as scores_of
from kdlayers._targets._codebook import CodebookTargets as CodebookTargets
from kdlayers._targets._decisions import DecisionTargets as DecisionTargets
