"""The losses: each a term that compares the student's tensor with the teacher's."""

from kdlayers.losses._base import DistillLoss as DistillLoss
from kdlayers.losses._dkd import DKDLoss as DKDLoss
from kdlayers.losses._kd import KDLoss as KDLoss
from kdlayers.losses._template import TemplateLoss as TemplateLoss
