"""What became of a request that a server did not answer: its error, in words, and whether another server may answer it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ncalign.generation.refusals import reason_of
from ncalign.generation.transport import LONGEST_WAIT, ApiKey, asked_to_wait

if TYPE_CHECKING:
    from openai import OpenAIError

DOWN = frozenset({502, 503, 504})
"""Status with which a proxy says that a server is down, or a server that it has no model."""

_ABOUT_THE_REQUEST = frozenset({400, 404, 413, 422})
# Another server may do better on these, as on any from 500 on.
_ELSEWHERE = frozenset({408, 409, 429})


class ServerError(RuntimeError):
    """A server that gave no answer after all retries; what it answered before is kept.

    Attributes:
        refused: whether it said that it does not take this very request (a status of 400 and the like), so that others may
            fare better, or answered it with what can't be used; false where it is down, overloaded, or wants another key.
        unusable: whether its answers can't be used.
        status: of its answer; None where there was none.
        body: what it answered, as it came; never shown.
    """

    def __init__(
        self, message: str, *, refused: bool = False, unusable: bool = False, status: int | None = None, body: str = ""
    ) -> None:
        super().__init__(message)
        self.refused, self.unusable, self.status, self.body = refused or unusable, unusable, status, body


def is_elsewhere(error: ServerError) -> bool:
    """Whether another server of the same model may answer what this one did not."""
    return error.status is None or error.status >= 500 or error.status in _ELSEWHERE


def server_error(error: OpenAIError, url: str, *, key: ApiKey, model: str) -> ServerError:
    """What the library raised, as an error that says what the server said, without the key."""
    from openai import APIStatusError

    if not isinstance(error, APIStatusError):
        cause = f"{error} {error.__cause__ or ''}".strip()
        return ServerError(f"server {url}: {reason_of(key.hidden(cause))}")
    status, response = error.status_code, error.response
    said = reason_of(key.hidden(response.text) or key.hidden(str(error)))
    advice = {
        401: f"; is the key in {key.variable} right?",
        404: f"; does it serve the model {model!r}?",
        429: "; lower max_concurrency or set requests_per_minute",
    }.get(status, "")
    if 300 <= status < 400:
        place = reason_of(key.hidden(response.headers.get("location", "")))
        said = f"it redirects to {place!r}, and no redirect is followed; set base_url to where it really is"
    elif (wait := asked_to_wait(response)) > LONGEST_WAIT:
        advice += f"; it asks to wait {wait:.0f} s (Retry-After), and no more than {LONGEST_WAIT:.0f} s are waited: rerun then"
    message = f"server {url}: status {status}: {said}{advice}"
    return ServerError(message, refused=status in _ABOUT_THE_REQUEST, status=status, body=response.text)
