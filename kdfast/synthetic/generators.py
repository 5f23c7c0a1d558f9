"""What writes questions: a model of transformers, or an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import torch

from kdfast.common.device import pick_device
from kdfast.common.errors import UserError, first_line
from kdfast.common.files import listed, read_bytes, read_json_object
from kdfast.models.hub import local_folder, without_safetensors
from kdfast.teachers.cache import weights_key
from kdfast.tokenizers.load import load_tokenizer

SHORTEST_SECRET = 8  # characters; a shorter key, such as "none" of a local server, is none


class Reply(NamedTuple):
    """A generator's text. fault: why it is none, or is not whole; "" where it is. by: the model
    that says it wrote it."""

    text: str
    fault: str = ""
    by: str = ""


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the most probable token. max_new_tokens: in a reply, at most."""

    temperature: float
    max_new_tokens: int
    seed: int


class Generator(Protocol):
    """Writes a reply to each prompt.

    name, revision: what is written into the result. together: whether the replies to prompts that
    are asked together depend on one another.
    """

    name: str
    revision: str
    together: bool

    def replies(self, prompts: Sequence[str], batch: int) -> list[Reply | UserError]:
        """A reply to each, or the error that ends the run. batch: the number of this batch."""
        ...


class LocalGenerator:
    """A causal or a sequence-to-sequence model in a folder or on the hub.

    Raises UserError where none loads, or its tokenizer does not.
    """

    together = True

    def __init__(self, name: str, sampling: Sampling):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        role = "--generator"
        folder = local_folder(name, role)
        self.name, self.sampling, self.device = name, sampling, pick_device()
        if not listed(folder, "*.safetensors"):
            raise without_safetensors(folder, name, role)
        self.tokenizer = load_tokenizer(folder, role)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise UserError(f"{role} {name} has neither a padding nor an end token: state one.")
        template = read_json_object(folder / "tokenizer_config.json").get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = read_bytes(folder / "chat_template.jinja").decode("utf-8", "replace")
        self.template = template if isinstance(template, str) else None
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self.is_seq2seq = bool(config.is_encoder_decoder)
            auto: Any = AutoModelForSeq2SeqLM if self.is_seq2seq else AutoModelForCausalLM
            self.model, info = auto.from_pretrained(
                folder,
                dtype="auto" if self.device.type == "cuda" else torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # of a damaged folder it may be of any kind
            raise UserError(
                f"{role} {name} does not load as a model that writes text ({first_line(error)}): "
                "name a causal or a sequence-to-sequence one."
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{role} {name} lacks weights, such as {missing[0]}: name a model that writes text."
            )
        self.revision = weights_key(folder)
        self.model.to(self.device).eval()
        self.tokenizer.padding_side = "right" if self.is_seq2seq else "left"
        longest = (
            getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        )
        self.longest = longest if self.is_seq2seq else longest - sampling.max_new_tokens
        if self.longest < 1:
            raise UserError(
                f"--max_new_tokens is {sampling.max_new_tokens}, and {name} reads and writes "
                f"{longest} tokens in all: give a smaller one."
            )

    def replies(self, prompts: Sequence[str], batch: int) -> list[Reply | UserError]:
        """As Generator has it. What is drawn depends on the seed and the batch."""
        encoded = [self._encode(prompt) for prompt in prompts]
        short = [ids for ids in encoded if len(ids) <= self.longest]
        try:
            written = iter(self._generate(short, batch) if short else ())
        except torch.OutOfMemoryError:
            return [UserError("The GPU lacks memory for --generator: lower --batch_size.")]
        long = Reply("", "is not written, as the prompt is too long for the generator")
        return [next(written) if len(ids) <= self.longest else long for ids in encoded]

    def _encode(self, prompt: str) -> list[int]:
        if self.template is None:
            return self.tokenizer(prompt)["input_ids"]
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,  # those that can think ask for it; others do not know it
            )
        except Exception as error:  # whatever a template raises
            raise UserError(
                f"The chat template of --generator {self.name} fails ({first_line(error)}): "
                "mend it, or name another model."
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _generate(self, encoded: list[list[int]], batch: int) -> list[Reply]:
        inputs = self.tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(self.device)
        torch.manual_seed(self.sampling.seed + batch)
        temperature = self.sampling.temperature
        drawn = {"do_sample": True, "temperature": temperature} if temperature else {}
        ids = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.sampling.max_new_tokens,
            num_return_sequences=1,
            pad_token_id=self.tokenizer.pad_token_id,
            **({"do_sample": False} | drawn),
        )
        written = ids if self.is_seq2seq else ids[:, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends])}
        ends |= {self.tokenizer.pad_token_id, self.tokenizer.eos_token_id}
        is_full = written.shape[1] >= self.sampling.max_new_tokens
        return [
            Reply(text, "is cut by --max_new_tokens" if is_full and last not in ends else "")
            for text, last in zip(
                self.tokenizer.batch_decode(written, True), written[:, -1].tolist(), strict=True
            )
        ]


class Endpoint:
    """An OpenAI-compatible endpoint, with the key that OPENAI_API_KEY holds.

    Args:
        model: Its name there.
        base_url: Its address.
        sampling: As it is asked for; an endpoint may not heed a seed.
        request: Further fields of each request; None leaves out one that would be sent.
        tries: timeout, in seconds, and how often the client retries.

    Raises:
        UserError: Without the client or the key, and for a URL that cannot be used.
    """

    together = False
    revision = ""

    def __init__(
        self,
        model: str,
        base_url: str,
        sampling: Sampling,
        request: Mapping[str, Any],
        tries: tuple[float, int],
    ):
        try:
            import openai
        except ImportError:
            raise UserError(
                "--endpoint_model needs the client openai: pip install 'kdfast[openai]'."
            ) from None
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self.key:
            raise UserError(
                "OPENAI_API_KEY is not set: export the key; a local server takes any text."
            )
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("OPENAI_API_KEY holds what no key can: export it again.")
        self.name = model
        self.url = _checked(base_url)
        fields = {
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
            **request,
        }
        self.fields = {key: value for key, value in fields.items() if value is not None}
        self.errors = openai.OpenAIError
        self.rejections = (openai.BadRequestError, openai.UnprocessableEntityError)
        self.client = openai.OpenAI(
            api_key=self.key, base_url=base_url, timeout=tries[0], max_retries=tries[1]
        )
        self.has_replied = False

    def replies(self, prompts: Sequence[str], batch: int) -> list[Reply | UserError]:
        """As Generator has it; the prompts of a batch are asked at once.

        A prompt that is refused as such, by status 400 or 422, ends the run only where none has
        had a reply: then it is the request that is wrong, and not the passage.
        """
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(self._reply, prompts))
        self.has_replied |= any(isinstance(each, Reply) for each in found)
        rejected = Reply("", "is refused by the endpoint")
        return [
            rejected if self.has_replied and isinstance(each, Rejected) else each for each in found
        ]

    def _reply(self, prompt: str) -> Reply | UserError:
        try:
            completion = self.client.chat.completions.create(
                model=self.name,
                messages=[{"role": "user", "content": prompt}],
                extra_body=self.fields,
            )
            choice = completion.choices[0]
            text = choice.message.content
            refusal = getattr(choice.message, "refusal", None)
            finish, by = str(choice.finish_reason), str(completion.model or "")
        except self.errors as error:
            kind = Rejected if isinstance(error, self.rejections) else UserError
            return kind(
                f"{self.url} gave no reply ({type(error).__name__}: {self._hide(str(error))}): "
                "check --base_url, --endpoint_model, OPENAI_API_KEY and --request, and start again "
                "to go on."
            )
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            return UserError(
                f"{self.url} answered what is no chat completion ({type(error).__name__}): check "
                "--base_url, which usually ends with /v1, and start again to go on."
            )
        if refusal or finish == "content_filter":
            return Reply("", "is refused by the endpoint", self._hide(by)[:200])
        fault = "is cut by --max_new_tokens" if finish == "length" else ""
        if not isinstance(text, str):
            text, fault = "", fault or "is empty"
        return Reply(self._hide(text), fault, self._hide(by)[:200])

    def _hide(self, text: str) -> str:
        """The text without the key, which an endpoint may repeat."""
        return text.replace(self.key, "…") if len(self.key) >= SHORTEST_SECRET else text


class Rejected(UserError):
    """An endpoint refuses a request as such."""


def _checked(url: str) -> str:
    """A URL that can be shown. Raises UserError."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, usable = urlsplit(""), False
    if not usable:
        raise UserError(
            "--base_url (or OPENAI_BASE_URL) is no address such as http://localhost:8000/v1."
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            "--base_url holds a name, a password or a query, which the result would show: give the "
            "key by OPENAI_API_KEY."
        )
    return url
