"""The inputs of the trainer, in the order in which workflows save them: only ever append to the last group."""

import comfy.samplers
from comfy_api.latest import io

from ..trainers.dual_process import LEARN_AT, Settings
from ..trainers.objective import LIKELIHOOD, MARGIN, TARGET, Objective
from .lora import saved_loras
from .types import JudgeType, PromptsType, QuestionsType

NEW_LORA = "(a new LoRA)"
AUTOMATIC, ALWAYS, NEVER = "automatic", "always", "never"


def trainer_inputs() -> list[io.Input]:
    """All of them. Made anew whenever ComfyUI asks, so that new files show up in lists."""
    return [*_sockets(), *_teaching(), *_drawing(), *_judging(), *_further()]


def left_out() -> dict:
    """What the inputs are that a workflow need not have."""
    return {one.id: getattr(one, "default", None) for one in trainer_inputs() if one.optional}


def chosen_from_lists(values: dict) -> list[io.Input]:
    """The inputs whose value is read, and must therefore be in its list. That of continue_from is a file, which may
    have come since."""
    instead = {"sampler_name": values.get("sampler"), "scheduler": values.get("sigmas")}
    return [one for one in trainer_inputs() if instead.get(one.id) is None and one.id != "continue_from"]


def _sockets() -> list[io.Input]:
    """What is connected."""
    return [
        io.Model.Input("model", tooltip="The image model to teach, with the LoRAs and patches it carries."),
        io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
        io.Conditioning.Input("positive", tooltip="The prompt to train on; each of a batched one is a prompt."),
        io.Latent.Input("latent", tooltip="Picture size; its batch size is the pictures per step."),
        JudgeType.Input("judge", tooltip="The vision-language model that looks at the pictures."),
        QuestionsType.Input("questions", tooltip="What the judge is asked, and the answers you want."),
        io.Conditioning.Input("negative", optional=True, tooltip="Needed when cfg is not 1 and by CFG++."),
        PromptsType.Input("more_prompts", optional=True, tooltip="Each step draws one of these or positive."),
        io.Sigmas.Input("sigmas", optional=True, tooltip="Instead of scheduler and sampler_steps."),
        io.Sampler.Input("sampler", optional=True, tooltip="Instead of sampler_name."),
    ]


def _teaching() -> list[io.Input]:
    """How much is learned, and how fast."""
    return [
        io.Int.Input("steps", default=Settings.steps, min=1, max=10000, tooltip="Training steps at most."),
        io.Float.Input(
            "learning_rate",
            default=Settings.learning_rate,
            min=1e-7,
            max=1.0,
            step=1e-5,
            round=False,
            tooltip="Higher learns faster and ruins pictures sooner.",
        ),
        io.Int.Input("rank", default=16, min=1, max=512, tooltip="Width of the LoRA. 4 to 16 is plenty."),
    ]


def _drawing() -> list[io.Input]:
    """How pictures are drawn: as they will be drawn later."""
    return [
        io.Int.Input(
            "sampler_steps",
            default=4,
            min=1,
            max=200,
            tooltip="Steps of the sampler you will draw with: 1 to 4 for turbo models, 20 to 50 for others.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.SAMPLER_NAMES,
            default="euler",
            tooltip="The sampler you will draw with.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.SCHEDULER_NAMES,
            default="simple",
            tooltip="The noise schedule you will draw with.",
        ),
        io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale you will draw with."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=False,
            tooltip="Same seed and inputs, same LoRA, on one machine and with 'recompute' on always or never: "
            "automatic goes by the free memory, and rounding differs a little with what is recomputed.",
        ),
    ]


def _judging() -> list[io.Input]:
    """What the pictures are worth, and when they are good enough."""
    return [
        io.Combo.Input(
            "objective",
            options=[MARGIN, LIKELIHOOD, TARGET],
            tooltip="Answer margin: push until Yes or No is clearly won against the other, then stop; any other answer "
            "up to 'target'. Answer likelihood: the paper's cross-entropy. Answer target: the same up to 'target'.",
        ),
        io.Float.Input(
            "anchor",
            default=Settings.anchor,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="How strongly pictures are held to what the model would draw anyway. Lower it when the answer does "
            "not move, or the whole picture should change, as with colours; raise it when other things change too.",
        ),
        io.Float.Input(
            "judge_noise",
            default=Settings.judge_noise,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Noise laid over pictures before the judge sees them; keeps it from being fooled by "
            "patterns no person would see.",
        ),
        io.Int.Input(
            "check_every",
            default=Settings.check_every,
            min=0,
            max=1000,
            tooltip="Steps between looks at pictures of seeds that are not trained on. The LoRA that does best "
            "on them is kept. 0: never look, train all steps.",
        ),
        io.Float.Input(
            "stop_at",
            default=Settings.stop_at,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Training ends when the judge gives the wanted answers with this probability on those pictures, "
            "look after look; from the first time on the learning rate is a third. 1: hardly ever.",
        ),
    ]


def _further() -> list[io.Input]:
    """What most users leave alone."""
    return [
        io.Boolean.Input(
            "checkpointing",
            default=True,
            tooltip="Recompute activations in backward instead of keeping them, as 'recompute' says: much less memory, "
            "somewhat slower. Off: never recompute.",
        ),
        io.Combo.Input(
            "learn_at",
            options=LEARN_AT,
            tooltip="The sampler steps that are learned from. Early steps decide what is where, late ones how it is "
            "drawn; any step teaches both, and left the cleanest pictures where it was measured. Fresh noise: draw "
            "once, learn the last step under as many noises as 'accumulate' says.",
        ),
        io.Int.Input(
            "accumulate",
            default=Settings.accumulate,
            min=1,
            max=256,
            tooltip="Passes of one batch that make one step: larger batches than fit on the GPU.",
        ),
        io.String.Input(
            "targets",
            default="",
            tooltip="Regular expression for the layers to adapt, for example 'attn'. Empty: attention and MLPs "
            "of all blocks. Modulation layers are adapted only when named, for example 'attn|img_mod'.",
        ),
        io.Boolean.Input(
            "self_check",
            default=True,
            tooltip="Before the first step, compare gradients with what the model really does. Finds attention "
            "kernels, patches and loaders that would train wrongly without an error.",
        ),
        io.Combo.Input(
            "continue_from",
            options=[NEW_LORA, *saved_loras()],
            tooltip="A saved LoRA to train further, of the same rank. A LoRA that is on the model already "
            "stays as it is, and a second one is learned on top.",
        ),
        io.Float.Input(
            "drift_limit",
            default=Settings.drift_limit,
            min=0.0,
            max=10.0,
            step=0.05,
            optional=True,
            tooltip="When pictures of seeds that are not trained on get darker, greyer, emptier or more alike, or the "
            "reverse, by more than this share (0.25: 25%), training goes back to its best LoRA and on at a third of "
            "the learning rate; the fourth time it stops. 0: never.",
        ),
        io.Float.Input(
            "target",
            default=Objective.target,
            min=0.5,
            max=0.9999,
            step=0.001,
            round=False,
            optional=True,
            tooltip="Probability at which an answer counts as won and stops pushing (not for answer likelihood).",
        ),
        io.Float.Input(
            "augment",
            default=Settings.augment,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="How much pictures are cropped and changed in contrast and brightness before the judge sees them "
            "(1: up to 10% and 20%). Helps against a judge that is fooled; blurs what depends on exact places.",
        ),
        JudgeType.Input(
            "second_judge",
            optional=True,
            tooltip="Never trained against, only asked about pictures of seeds not trained on. Of these looks, "
            "the LoRA that this judge likes best is kept, and training ends when both judges say stop_at. Connect "
            "another model than judge.",
        ),
        io.Combo.Input(
            "recompute",
            options=[AUTOMATIC, ALWAYS, NEVER],
            default=AUTOMATIC,
            optional=True,
            tooltip="Automatic: a trial pass before the first step measures what fits into the free memory; only "
            "blocks that do not fit are recomputed. Always: all blocks, for the least memory. Only read while "
            "checkpointing is on.",
        ),
        io.Float.Input(
            "prior",
            default=Settings.prior,
            min=0.0,
            max=1000.0,
            step=0.5,
            optional=True,
            tooltip="How strongly what the model without the LoRA would clean away, such as stains, seams and false "
            "lines, is kept out of pictures. Raise it when pictures get dirty; lower it when the answer does not move, "
            "at high cfg, and to 0 for colours. 0 also saves two passes of the model in every fourth step.",
        ),
    ]
