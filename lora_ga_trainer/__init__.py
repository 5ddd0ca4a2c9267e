"""
Start LoRA adapters where the gradient of the full weights points.

Letters, used in every signature, docstring and test:

    W      frozen base weight (out, in)
    G      gradient dL/dW (out, in), G = U S V^T; [G]_k is its best rank-k approximation
    A, B   LoRA factors (r, in) and (out, r) that learn; A0, B0 their start
    s      PEFT's scaling of a layer, alpha / r, or alpha / sqrt(r) with rsLoRA; the adapted weight is W + s B A
    r      rank of the factors that learn; an anchored adapter is stored with rank 2r
    c      common length of the rows of A0 and the columns of B0 (LoRA-GA)
    x, dy  input (N, in) and output-gradient (N, out) of a layer, G = dy^T x; N tokens of one pass
    Omega  (in, k) and Psi (out, k): test matrices of a sketch, which keeps Y = G Omega and Z = G^T Psi
    k      columns of a sketch
    E      experts of a fused layer, each with factors of its own; 1 in a linear layer
    L      layers of one shape that are worked on as a stack
    gA, gB gradients of A and B as autograd gives them; dA, dB the same after LoRA-Pro's correction; X its free matrix

Words, one for each thing:

    init         a rule that makes A0 and B0 from a gradient, an entry of `INITS`
    start        what is done with it: probe, compute the factors, write them, report
    probe        the passes over training samples that estimate G
    accumulator  the sum of one layer's gradient over the probe: whole (exact) or as a sketch
    estimate     what the probe hands over: the accumulators of all layers and what they were averaged over
    anchored     stored in delta form, [A; A - A0] and [B - B0, B0], so that the base is never changed
    layer        one adapted weight, or the fused weights of all experts of a block
    pair         the two factors A, B of one layer and adapter, which an optimizer steps together
    engine       what runs the processes: one process, DDP, FSDP or DeepSpeed ZeRO
"""

from .adapters.find import find_adapted_layers
from .adapters.layer import AdaptedLayer
from .adapters.storage import anchored_parameter_names
from .analysis.analyse import analyse_adapter
from .analysis.average import average_adapters
from .analysis.callback import AdapterAnalysisCallback
from .analysis.intruders import remove_intruders
from .analysis.report import AdapterReport
from .callback import LoRAGACallback, find_learning_rate
from .config import LoRAGAConfig
from .gradients.estimate import GradientEstimate
from .gradients.probe import estimate_gradients
from .maths.factors import lora_ga_factors, lora_one_factors
from .maths.inits import INITS, Init, LayerGradient
from .maths.lora_pro import correct_gradients
from .maths.ranks import RULES, LayerEvidence, RankRule
from .optimizers.adamw import LoRAProAdamW
from .optimizers.builders import BuildRequest
from .optimizers.registry import OPTIMIZERS, OptimizerEntry
from .optimizers.wrapper import LoRAProOptimizer
from .ranks.find import plan_ranks
from .ranks.plan import LayerRank, RankPlan
from .rates.report import RateReport
from .saving.export import export_adapter
from .saving.intact import newest_complete_checkpoint
from .saving.load import load_adapter
from .starts.report import GradientReport
from .starts.write import write_start
from .trainer import LoRAGAMixin, LoRAGATrainer, Seq2SeqLoRAGATrainer


__version__ = "0.1.0"

__all__ = [
    "INITS",
    "OPTIMIZERS",
    "RULES",
    "AdaptedLayer",
    "AdapterAnalysisCallback",
    "AdapterReport",
    "BuildRequest",
    "GradientEstimate",
    "GradientReport",
    "Init",
    "LayerEvidence",
    "LayerGradient",
    "LayerRank",
    "LoRAGACallback",
    "LoRAGAConfig",
    "LoRAGAMixin",
    "LoRAGATrainer",
    "LoRAProAdamW",
    "LoRAProOptimizer",
    "OptimizerEntry",
    "RankPlan",
    "RankRule",
    "RateReport",
    "Seq2SeqLoRAGATrainer",
    "analyse_adapter",
    "anchored_parameter_names",
    "average_adapters",
    "correct_gradients",
    "estimate_gradients",
    "export_adapter",
    "find_adapted_layers",
    "find_learning_rate",
    "load_adapter",
    "lora_ga_factors",
    "lora_one_factors",
    "newest_complete_checkpoint",
    "plan_ranks",
    "remove_intruders",
    "write_start",
]
