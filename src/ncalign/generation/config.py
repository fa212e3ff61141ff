"""Configuration of `ncalign generate` and of servers."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ncalign.core.config import Frozen, Overwrite, Seed
from ncalign.data.config import JoinRows, OnBadRow
from ncalign.model.config import ChatTemplateKwargs, ControlTokensInText, DType, StringPrompts, TemplateDate


class ServerConfig(Frozen):
    """A model on an OpenAI-compatible server (vLLM, SGLang, llama.cpp, an API)."""

    base_url: str = Field("http://localhost:8000/v1", description="URL at which the server listens, with /v1.")
    base_urls: tuple[str, ...] = Field(
        (), description="URLs of several servers of the same model, which are asked in turn; in place of base_url."
    )
    model: str = Field("default", description="Name of the model on the server.")
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the API key; none: the server needs no key."
    )
    max_concurrency: int = Field(16, ge=1, description="Maximum number of requests under way at a time, on each server.")
    requests_per_minute: float | None = Field(
        None, gt=0, description="Maximum number of requests begun in a minute; none: no limit."
    )
    timeout_seconds: float = Field(600.0, gt=0, description="Seconds after which a request is given up.")
    max_retries: int = Field(
        8, ge=0, description="Maximum number of retries of a request that fails or brings no usable answer."
    )
    logprobs: bool = Field(True, description="Ask for the log-probs of the sampled tokens; some servers have none.")

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' URLs: one, or several."""
        return self.base_urls or (self.base_url,)

    @field_validator("base_urls")
    @classmethod
    def _are_addresses(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(values)) < len(values):
            raise PydanticCustomError("urls", "must name each server once")
        return tuple(map(cls._is_an_address, values))

    @model_validator(mode="after")
    def _one_way(self) -> ServerConfig:
        if self.base_urls and "base_url" in self.model_fields_set:
            raise ValueError("give base_url, or base_urls for several servers, and not both")
        return self

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if "@" in value:  # a name and a password would stand in messages and in files
            raise PydanticCustomError("secret", "must hold no name or password: name the variable with the key in api_key_env")
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise PydanticCustomError("url", "must be a URL such as http://localhost:8000/v1")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # The key itself, given here by mistake, would stand in messages and in files.
        if value and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise PydanticCustomError("secret", "must be the name of an environment variable that holds the key, not the key")
        return value


class GenerateConfig(Frozen):
    """`ncalign generate`: sample K candidate completions for each prompt."""

    model: str | None = Field(None, description="Model folder or hub id; an adapter folder loads its base model too.")
    server: ServerConfig | None = Field(None, description="Sample from a model on a server instead of a local one.")
    prompts: Path = Field(description="Groups whose prompts are answered, or FOLDER:SPLIT; their candidates may be absent.")
    output: Path = Field(description="Groups file to write.")
    overwrite: Overwrite = False
    num_samples: int = Field(8, ge=1, description="K, the number of completions sampled for each prompt.")
    max_new_tokens: int = Field(256, ge=1, description="Maximum number of tokens of a completion.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature; 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability; 1: off.")
    top_k: int = Field(0, ge=0, description="Sample from the k likeliest tokens; 0: off.")
    batch_size: int = Field(64, ge=1, description="Number of completions sampled at a time.")
    string_prompts: StringPrompts = "auto"
    control_tokens_in_text: ControlTokensInText = "keep"
    template_date: TemplateDate = None
    chat_template_kwargs: ChatTemplateKwargs = ()
    dtype: DType = "auto"
    seed: Seed = Field(0, description="Random seed of the sampling.")
    on_bad_row: OnBadRow = "error"
    join_rows: JoinRows = True
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")

    @model_validator(mode="after")
    def _one_of_both(self) -> GenerateConfig:
        if (self.model is None) == (self.server is None):
            raise ValueError("give model, a folder or hub id, or server, and not both")
        if self.server is not None and self.control_tokens_in_text != "keep":
            raise ValueError("control_tokens_in_text is for a local model: a server makes tokens of prompts itself")
        return self
