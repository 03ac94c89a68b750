"""The losses: each is a term that compares the student's tensor with the teacher's.

This folder imports `functional`, `_targets`, `_models`, `_utils` and `errors`; `_step` and the
folders above it import this one.
"""

from kdlayers.losses._aekt import AEKTLoss as AEKTLoss
from kdlayers.losses._attention import AttentionTransferLoss as AttentionTransferLoss
from kdlayers.losses._base import DistillLoss as DistillLoss
from kdlayers.losses._binary import BinaryKDLoss as BinaryKDLoss
from kdlayers.losses._channelwise import ChannelWiseLoss as ChannelWiseLoss
from kdlayers.losses._dist import DISTLoss as DISTLoss
from kdlayers.losses._dkd import DKDLoss as DKDLoss
from kdlayers.losses._feature import FeatureLoss as FeatureLoss
from kdlayers.losses._fitnet import FitNetLoss as FitNetLoss
from kdlayers.losses._inherit_explore import InheritExploreLoss as InheritExploreLoss
from kdlayers.losses._kd import KDLoss as KDLoss
from kdlayers.losses._mutual import MutualLoss as MutualLoss
from kdlayers.losses._rkd import RKDLoss as RKDLoss
from kdlayers.losses._similarity import SimilarityPreservingLoss as SimilarityPreservingLoss
from kdlayers.losses._simplifier import AttentionSimplifier as AttentionSimplifier
from kdlayers.losses._student_friendly import StudentFriendlyKDLoss as StudentFriendlyKDLoss
from kdlayers.losses._template import TemplateLoss as TemplateLoss
