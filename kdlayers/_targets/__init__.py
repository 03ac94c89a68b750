"""Targets for the template scores, learnt from the teacher: codebooks and decisions.

This folder imports `functional`, `_utils` and `errors`; `losses` and the folders above it import
this one.
"""

from kdlayers._targets.base import TemplateTargets as TemplateTargets
from kdlayers._targets.base import divergence_from as divergence_from
from kdlayers._targets.codebook import CodebookTargets as CodebookTargets
from kdlayers._targets.decisions import DecisionTargets as DecisionTargets
