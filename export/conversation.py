"""How each family writes a prompt: chat templates, image tags, and the tokens that end an answer.

Sources: Qwen-VL's qwen_generation_utils.py (chatml in pieces), LLaVA's conversation.py (its templates,
chosen by the model's name), and the chat template that comes with a checkpoint in transformers' layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UserError
from .bundle import ChatRules, GenerationSpec, ImageRules, Piece, PromptRules
from .tokenizer import load, named, settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .checkpoint import Checkpoint
    from .families import Options

# ------------------------------------------------------------------------------- LLaVA's templates

EXAMPLE = (
    "###Human: What are the key differences between renewable and non-renewable energy sources?"
    "###Assistant: Renewable energy sources are those that can be replenished naturally in a "
    "relatively short amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-"
    "renewable energy sources, on the other hand, are finite and will eventually be depleted, "
    "such as coal, oil, and natural gas. Here are some key differences between renewable and non-"
    "renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
    "emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n"
)
LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n\nIf a question does not make any sense, or is not "
    "factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the human's questions."
)
USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is "
    "able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language.The visual content will be provided with the "
    "following format: <Image>visual content</Image>."
)
MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and"
    " honest answers."
)


@dataclass(frozen=True)
class Conversation:
    template: str  # Jinja, see bundle.ChatRules
    system: str | None = None
    stop: str = ""  # what ends an answer beside the end token

    def rules(self, name: str, tokens: Mapping[str, str], image: str) -> ChatRules:
        return ChatRules(
            "jinja", name, system=self.system, image=image, template=self.template, tokens=dict(tokens)
        )


def _colon(roles: tuple[str, str], sep: str, end: str, system: str, example: str = "") -> Conversation:
    """`USER: … ASSISTANT: …`; `sep` after system and questions, `end` after answers."""
    user, assistant = roles
    template = (
        f"{{{{ system }}}}{example}{sep}{{% for m in turns %}}"
        f"{{% if m.role == 'user' %}}{user}: {{{{ m.content }}}}{sep}"
        f"{{% else %}}{assistant}: {{{{ m.content }}}}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}:{{% endif %}}"
    )
    return Conversation(template, system, sep if sep == end else "")


def _chatml(system: str) -> Conversation:
    """LLaVA's chatml: no newline between turns."""
    template = (
        "{{ '<|im_start|>system\n' + system }}<|im_end|>{% for m in turns %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return Conversation(template, system, "<|im_end|>")


def _instruct(system: str, sep: str) -> Conversation:
    """`[INST] … [/INST]`, the system text inside the first question."""
    template = (
        "{% for m in turns %}{% if m.role == 'user' %}"
        f"{{{{ '' if loop.first else '{sep}' }}}}[INST] "
        "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' }}"
        "{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    return Conversation(template, system)


_PLAIN = Conversation("{% for m in turns %}{{ m.content + '\n' }}{% endfor %}", stop="\n")
_V0 = _colon(("Human", "Assistant"), "###", "###", HUMAN, EXAMPLE)
_VICUNA_V1 = _colon(("USER", "ASSISTANT"), " ", "</s>", USER)

CONVERSATIONS = {
    "v0": _V0,
    "vicuna_v0": _V0,
    "llava_v0": _colon(("Human", "Assistant"), "###", "###", HUMAN),
    "v0_mmtag": _colon(("Human", "Assistant"), "###", "###", MMTAG),
    "v1": _VICUNA_V1,
    "vicuna_v1": _VICUNA_V1,
    "llava_v1": _colon(("USER", "ASSISTANT"), " ", "</s>", HUMAN),
    "v1_mmtag": _colon(("USER", "ASSISTANT"), " ", "</s>", MMTAG),
    "llama_2": _instruct(LLAMA_2, "<s>"),
    "llava_llama_2": _instruct(VISION, "<s>"),
    "mistral_instruct": _instruct("", ""),
    "chatml_direct": _chatml("Answer the questions."),
    "mistral_direct": _chatml("Answer the questions."),
    "mpt": _chatml(MPT),
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
}


def conversation_of(names: list[str], default: str) -> str:
    """LLaVA's choice by the model's name; the first of `names` that says something decides."""
    for name in names:
        for mark, conversation in (
            ("llama-2", "llava_llama_2"),
            ("mistral", "mistral_instruct"),
            ("v1.6-34b", "chatml_direct"),
            ("v1", "llava_v1"),
            ("mpt", "mpt"),
        ):
            if mark in name.lower():
                return conversation
    return default


def _model_names(checkpoint: Checkpoint) -> list[str]:
    """The folder's own name, a hub cache's repository, and what config.json remembers."""
    parts = [p for p in checkpoint.path.parts if p.startswith("models--")]
    return [*parts[-1:], checkpoint.path.name, str(checkpoint.config.get("_name_or_path") or "")]


def _conversation(name: str) -> Conversation:
    if name not in CONVERSATIONS:
        raise UserError(f"conversation {name!r} is unknown; known are {', '.join(CONVERSATIONS)}")
    return CONVERSATIONS[name]


# ---------------------------------------------------------------------------------------- families


def qwen_prompt(folder: Path, generation: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Qwen-VL's `prompt`, `generation` and `tokenizer`, fields of a families.Plan.

    generation: its generation_config.json. Raises CheckpointError without a qwen.tiktoken, UserError
    for a template of another family.
    """
    from .families import generation_defaults, token_ids

    if not (folder / "qwen.tiktoken").is_file():
        raise CheckpointError(f"{folder} has no tokenizer: qwen.tiktoken is missing")
    if options.conversation not in (None, "chatml"):
        raise UserError(f"conversation {options.conversation!r} is unknown; Qwen-VL's is chatml")
    tokenizer = load(folder)
    ids = {name: _id(tokenizer, name, folder) for name in ("<img>", "</img>", "<imgpad>")}

    def turn(role: str, before: str) -> list[Piece]:
        start = [Piece(before)] if before else []
        return [
            *start, Piece("<|im_start|>", True), Piece(role), Piece("\n"), Piece("{content}"),
            Piece("<|im_end|>", True),
        ]  # fmt: skip

    rules = PromptRules(
        bos_ids=[],
        nfc=True,
        image=ImageRules(
            tags=["<img/>"],
            url_tag=["<img>", "</img>"],
            token_id=ids["<imgpad>"],
            prefix_ids=[ids["<img>"]],
            suffix_ids=[ids["</img>"]],
            inline=False,
        ),
        chat=ChatRules(
            kind="pieces",
            name="chatml",
            turns={
                "system": turn("system", ""),
                "user": turn("user", "\n"),
                "assistant": turn("assistant", "\n"),
            },
            generation=[Piece("\n"), Piece("<|im_start|>", True), Piece("assistant"), Piece("\n")],
            system="You are a helpful assistant.",
            image="Picture {n}:{image}\n",
            history_tokens=generation.get("max_window_size") or 6144,
        ),
    )
    end = _id(tokenizer, "<|endoftext|>", folder)
    chatml = [_id(tokenizer, name, folder) for name in ("<|im_end|>", "<|im_start|>")]
    eos = list(dict.fromkeys([*(token_ids(generation.get("eos_token_id")) or [end]), *chatml]))
    return {
        "prompt": rules,
        "generation": GenerationSpec(eos, [], generation_defaults(generation)),
        "tokenizer": tokenizer,
    }


def original_prompt(folder: Path, checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """Of LLaVA's original layout: as `qwen_prompt`. `<image>` is no token: text is cut there."""
    from tokenizers import AddedToken

    tokenizer = load(folder, slow=True)
    config = checkpoint.config
    extra = ["<im_patch>"] if config.get("mm_use_im_patch_token", True) else []
    if config.get("mm_use_im_start_end"):
        extra += ["<im_start>", "<im_end>"]
    for token in extra:
        if tokenizer.token_to_id(token) is None:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)])
    name = options.conversation or conversation_of(_model_names(checkpoint), "llava_v0")
    conversation = _conversation(name)
    tag = "<im_start>{image}<im_end>\n" if config.get("mm_use_im_start_end") else "{image}\n"
    image = ImageRules(["<image>"], [], -200, [], [], inline=False)
    chat = conversation.rules(name, named(folder), tag)
    return _plan_fields(folder, checkpoint, tokenizer, image, chat, conversation.stop)


def hf_prompt(folder: Path, checkpoint: Checkpoint, options: Options) -> dict[str, Any]:
    """Of transformers' layout: as `qwen_prompt`. The image token is in the tokenizer."""
    tokenizer = load(folder)
    c = checkpoint.config
    number = c.get("image_token_index", c.get("image_token_id", 32000))
    token = tokenizer.id_to_token(number)
    if token is None:
        raise CheckpointError(f"{folder}: image_token_index {number} of config.json is no token")
    image = ImageRules(list(dict.fromkeys([token, "<image>"])), [], number, [], [], inline=True)
    template, stop = None if options.conversation else chat_template(folder), ""
    if template is not None:
        chat = ChatRules(
            "jinja", "checkpoint", image="{image}\n", template=template,
            parts=loops_over_parts(template), tokens=named(folder),
        )  # fmt: skip
    else:
        name = options.conversation or conversation_of(_model_names(checkpoint), "llava_v1")
        conversation = _conversation(name)
        chat, stop = conversation.rules(name, named(folder), "{image}\n"), conversation.stop
    return _plan_fields(folder, checkpoint, tokenizer, image, chat, stop)


def chat_template(folder: Path) -> str | None:
    """The Jinja template of a checkpoint, or None; the newest way of keeping it wins."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = settings(folder, name).get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t.get("name"): t.get("template") for t in template}.get("default")
        elif isinstance(template, Mapping):
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None


def loops_over_parts(template: str) -> bool:
    """Whether a template takes a message's content as a list of parts; older ones want a string."""
    loops = [line.partition("%}")[0] for line in template.split("{%") if line.lstrip("- ").startswith("for")]
    return any("content" in loop.partition(" in ")[2] for loop in loops)


def _plan_fields(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    image: ImageRules,
    chat: ChatRules,
    stop: str,
) -> dict[str, Any]:
    from .families import generation_defaults, token_ids

    generation = checkpoint.json("generation_config.json")
    roles = named(folder)
    text = checkpoint.config.get("text_config") or {}
    eos = (
        token_ids(generation.get("eos_token_id"))
        or token_ids(checkpoint.config.get("eos_token_id", text.get("eos_token_id")))
        or [_id(tokenizer, roles.get("eos_token", "</s>"), folder)]
    )
    words = [stop] if stop else []
    number = tokenizer.token_to_id(stop) if stop else None
    if number is not None and number in tokenizer.get_added_tokens_decoder():
        eos, words = list(dict.fromkeys([*eos, number])), []
    return {
        "prompt": PromptRules(_bos(folder, tokenizer), False, image, chat),
        "generation": GenerationSpec(eos, words, generation_defaults(generation)),
        "tokenizer": tokenizer,
    }


def _bos(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """What the reference puts before a text: by the fast tokenizer's own rule, else by the config."""
    if tokenizer.post_processor is not None and (ids := tokenizer.encode("").ids):
        return ids[:1]
    config = settings(folder, "tokenizer_config.json")
    name = config.get("tokenizer_class") or ""
    if not config.get("add_bos_token", name.startswith("Llama") or not name):
        return []
    bos = named(folder).get("bos_token")
    return [_id(tokenizer, bos, folder)] if bos else []


def _id(tokenizer: Tokenizer, token: str, folder: Path) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise CheckpointError(f"{folder}: the tokenizer has no token {token!r}")
    return number
