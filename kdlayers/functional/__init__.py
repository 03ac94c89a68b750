"""The closed forms of the losses: functions of the student's and the teacher's tensors.

This folder imports `_utils` and `errors`. It knows no models, layers or hooks.
"""

from kdlayers.functional._aekt import aekt as aekt
from kdlayers.functional._binary import binary_kd as binary_kd
from kdlayers.functional._channelwise import channelwise as channelwise
from kdlayers.functional._dist import dist as dist
from kdlayers.functional._dkd import dkd as dkd
from kdlayers.functional._dkd import nckd as nckd
from kdlayers.functional._dkd import tckd as tckd
from kdlayers.functional._inherit import exploration as exploration
from kdlayers.functional._inherit import inheritance as inheritance
from kdlayers.functional._kd import kd as kd
from kdlayers.functional._rkd import rkd_angle as rkd_angle
from kdlayers.functional._rkd import rkd_distance as rkd_distance
from kdlayers.functional._similarity import similarity_preserving as similarity_preserving
from kdlayers.functional._standardize import standardize as standardize
from kdlayers.functional._template import template_kl as template_kl
