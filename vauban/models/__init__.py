"""Everything that sees a model: loading, its anatomy, the forward pass, writers.

In reading order:

weight_files   which files of a folder are its weights
loading        open a folder or a Hub id, check it, choose its dtype; the bundled organisms
info           what a report says of a model and of the machine
anatomy        where the parts of a model are, found by rule
families       what the rules cannot see, family by family
notes          what has been learnt about one model, kept on it
swap           other methods for some modules for a while: how one looks into a model
taps           record and change the stream while the model runs its own forward
walk           the explicit loop over the blocks, and the tap
parity         proof that both give what the model itself gives
caches         copies of mlx-lm's prompt caches with other rows
forward        logits and residuals of right-padded rows; what rows may share
lens           the logit lens
writers        the matrices that write to the stream, by name
model_identity  what tells a model from another
module_probe   single modules while the model runs; the writers by experiment
"""

from vauban.models.anatomy import Anatomy, anatomy, check_same_vocabulary
from vauban.models.families import NOT_CUTTABLE, family_of
from vauban.models.forward import ForwardOutput, can_pad, can_share, forward, row_checks
from vauban.models.info import DeviceInfo, ModelInfo, describe, device_info, folder_of
from vauban.models.lens import unembed
from vauban.models.loading import (
    faster_twin,
    load,
    load_tokenizer,
    model_folder,
    organism_path,
)
from vauban.models.model_identity import (
    Fingerprint,
    check_measured_on,
    check_tokenizer,
    fingerprint,
)
from vauban.models.module_probe import compare_with_probe, module_inputs, output_gradients
from vauban.models.notes import forget, set_aside
from vauban.models.parity import ForwardCheck, verify_forward
from vauban.models.swap import Swap, around, swapped
from vauban.models.taps import Stream, tapped
from vauban.models.weight_files import (
    WeightFiles,
    check_safetensors,
    check_weights,
    weight_files,
)
from vauban.models.writers import (
    WRITER_NAMES,
    Writer,
    branches,
    norm_gain,
    quantization_of,
    residual_writers,
    unpacked_shape,
)
