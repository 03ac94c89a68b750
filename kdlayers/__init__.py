"""Drop-in knowledge distillation for PyTorch vision models, with learnable KD layers.

Example:
    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from kdlayers import CodebookTargets, KDPoint, attach_kd
    >>> student, teacher = resnet18(num_classes=10), resnet18(num_classes=10)
    >>> kd = attach_kd(student, teacher, at=[KDPoint("layer4", targets=CodebookTargets(16))])
    >>> images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    >>> kd.fit([(images, labels)])
    >>> loss = torch.nn.functional.cross_entropy(student(images), labels) + kd.loss(labels)
    >>> loss.backward()
"""

from kdlayers import errors as errors
from kdlayers import functional as functional
from kdlayers import losses as losses
from kdlayers import schedules as schedules
from kdlayers import viz as viz
from kdlayers._attaching.attach import attach_kd as attach_kd
from kdlayers._attaching.candidates import find_points as find_points
from kdlayers._attaching.mutual import attach_mutual as attach_mutual
from kdlayers._attaching.points import KDPoint as KDPoint
from kdlayers._layer.layer import KDLayer as KDLayer
from kdlayers._layer.layer import TemplateHead as TemplateHead
from kdlayers._leaving.bake import bake as bake
from kdlayers._leaving.fold import fold as fold
from kdlayers._leaving.prune import prune_templates as prune_templates
from kdlayers._leaving.save import load_student as load_student
from kdlayers._leaving.save import save_student as save_student
from kdlayers._records.dataset import RecordedDataset as RecordedDataset
from kdlayers._records.dataset import open_record as open_record
from kdlayers._step.handle import KDHandle as KDHandle
from kdlayers._step.normalisation import Renormalize as Renormalize
from kdlayers._step.recorded_teacher import RecordedTeacher as RecordedTeacher
from kdlayers._targets import CodebookTargets as CodebookTargets
from kdlayers._targets import DecisionTargets as DecisionTargets
from kdlayers.losses import AEKTLoss as AEKTLoss
from kdlayers.losses import AttentionTransferLoss as AttentionTransferLoss
from kdlayers.losses import BinaryKDLoss as BinaryKDLoss
from kdlayers.losses import ChannelWiseLoss as ChannelWiseLoss
from kdlayers.losses import DistillLoss as DistillLoss
from kdlayers.losses import DISTLoss as DISTLoss
from kdlayers.losses import DKDLoss as DKDLoss
from kdlayers.losses import FeatureLoss as FeatureLoss
from kdlayers.losses import FitNetLoss as FitNetLoss
from kdlayers.losses import InheritExploreLoss as InheritExploreLoss
from kdlayers.losses import KDLoss as KDLoss
from kdlayers.losses import MutualLoss as MutualLoss
from kdlayers.losses import RKDLoss as RKDLoss
from kdlayers.losses import SimilarityPreservingLoss as SimilarityPreservingLoss
from kdlayers.losses import StudentFriendlyKDLoss as StudentFriendlyKDLoss

__version__ = "0.1.0"
