"""The faults: each is one plausible mistake, planted by replacing one text, and the part of the suite that must see it.

A fault that nothing sees is a hole in the tests. A text that is no longer found exactly once is an error: when code
changes, its faults move with it.
"""

from __future__ import annotations

from fault import Fault as Fault
from faults_attention import ATTENTION_FAULTS, LOSS_FAULTS
from faults_calibration import CALIBRATION_FAULTS
from faults_compression import COMPRESSION_FAULTS
from faults_generate import GENERATE_FAULTS
from faults_groupwise import GROUPWISE_FAULTS
from faults_int8 import INT8_FAULTS
from faults_losses import LINEAR_LOSS_FAULTS
from faults_mlp import MLP_FAULTS
from faults_onnx import ONNX_FAULTS
from faults_products import BINDING_FAULTS, KERNEL_FAULTS, PYTHON_FAULTS
from faults_prune import PRUNE_FAULTS
from faults_rows import ACTIVATION_FAULTS, DROPOUT_FAULTS, MASKED_FAULTS, NORM_FAULTS, ROPE_FAULTS
from faults_sequences import SEQUENCE_FAULTS
from faults_sparse import SPARSE_FAULTS
from faults_sparsify import SPARSIFY_FAULTS

FAULTS = [
    *KERNEL_FAULTS,
    *BINDING_FAULTS,
    *PYTHON_FAULTS,
    *LOSS_FAULTS,
    *LINEAR_LOSS_FAULTS,
    *ATTENTION_FAULTS,
    *SEQUENCE_FAULTS,
    *NORM_FAULTS,
    *ACTIVATION_FAULTS,
    *MASKED_FAULTS,
    *DROPOUT_FAULTS,
    *ROPE_FAULTS,
    *MLP_FAULTS,
    *GROUPWISE_FAULTS,
    *GENERATE_FAULTS,
    *INT8_FAULTS,
    *CALIBRATION_FAULTS,
    *COMPRESSION_FAULTS,
    *ONNX_FAULTS,
    *PRUNE_FAULTS,
    *SPARSE_FAULTS,
    *SPARSIFY_FAULTS,
]
