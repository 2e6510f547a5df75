"""What requests may hold; anything else is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kilobayes.errors import KilobayesError

Share = Annotated[float, Field(gt=0, lt=1)]
Text = str | tuple[str, str]
Cell = str | bool | int | float | list[str] | dict[str, list[str]] | None
Kind = TypeVar("Kind", bound="Body")
CHAT_TOKENS = 256  # of a reply, where a conversation's request does not say


class Body(BaseModel):
    """A request's JSON object."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None


class Predict(Body):
    """Texts, pairs of texts, or rows with columns, to be classified.

    Attributes:
        texts: one or many.
        rows: columns by name, as a decoder's template names them; of questions also their options.
        coverage: asks for sets of labels that hold the right one so often.
        sets: how they are made.
        max_error: accept so many rows that at most this share is wrong.
    """

    texts: Annotated[list[Text], Field(min_length=1)] | None = None
    rows: Annotated[list[dict[str, Cell]], Field(min_length=1)] | None = None
    coverage: Share | None = None
    sets: Literal["lac", "aps", "raps", "top_k"] = "lac"
    max_error: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_text(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("texts"), str):
            return given | {"texts": [given["texts"]]}
        if isinstance(given, dict) and isinstance(given.get("rows"), dict):
            return given | {"rows": [given["rows"]]}
        return given

    @model_validator(mode="after")
    def _one_kind(self) -> Predict:
        if (self.texts is None) == (self.rows is None):
            raise ValueError("give texts or rows")
        return self

    @property
    def given(self) -> list[Any]:
        """Texts or rows, whichever there are."""
        return list(self.texts or self.rows or ())


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Written(Body):
    """What completions of texts and of conversations have in common, named as OpenAI's API names it.

    Attributes:
        stop_entropy, stop_mutual_information: end a text, without the token, where the averaged
            probabilities have more entropy, or the draws disagree more; nats.
    """

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1, le=64)] = 1
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop_entropy: Annotated[float, Field(ge=0)] | None = None
    stop_mutual_information: Annotated[float, Field(ge=0)] | None = None
    user: str | None = None  # as OpenAI's clients may send; not used
    metadata: dict[str, str] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None

    @property
    def stops(self) -> list[str]:
        """Strings that end a text."""
        given = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        return [word for word in given if word]


class Completion(Written):
    """Texts to go on from."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] = False


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str
    name: str | None = None


class Chat(Written):
    """A conversation to be replied to."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def read(kind: type[Kind], body: bytes) -> Kind:
    """A request's body, checked.

    Raises:
        KilobayesError: it is no JSON in UTF-8, or not what is asked for.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise KilobayesError(
            f"{place or 'the body'}: {first['msg']}",
            f"{error.error_count()} such in the request" if error.error_count() > 1 else "",
        ) from None
