"""Every error that rtp_llm raises on purpose.

    RtpLlmError                      code  HTTP  exit
    ├── UserError                     507   400    2    the caller can mend it
    │   ├── EmptyPrompt               510   400    2
    │   ├── PromptTooLong             511   400    2
    │   ├── GenerationTimeout         514   408    2
    │   ├── GenerateConfigError       604   400    2
    │   │   └── NotSupportedYet       604   400    2    known, and not built yet
    │   ├── Overloaded                409   429    2
    │   ├── NotReady                  503   503    2    the model is still loading
    │   ├── BadField                  507   400    2    one field of a request, named
    │   ├── ImageError
    │   │   ├── ImageInputTooLong     901   400    2
    │   │   ├── ImageWrongFormat      902   400    2    tags and images do not match
    │   │   ├── ImageDecodeError      903   400    2
    │   │   ├── ImageUnsupported      905   400    2
    │   │   └── ImageDownloadFailed   906   400    2
    │   ├── CheckpointError           507   400    2    a checkpoint cannot be read as it claims
    │   │   └── UnknownArchitecture   507   400    2
    │   ├── BundleError               507   400    2    corrupted, foreign or newer bundle
    │   └── MissingDependency         507   400    2    names the pip command
    └── InternalError                 500   500    1    we broke
        ├── VisionGraphMissing        904   500    1
        ├── VisionFailed              907   500    1
        └── VerificationFailed        500   500    1

`code` and `name` are the public error codes of the HTTP server (`902_MM_WRONG_FORMAT_ERROR`),
`status` its HTTP status, `exit_code` that of the command line.
"""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


LONGEST = 1000  # characters of a message to a client


def shown(value: object) -> str:
    """A caller's value in a message: its repr, cut in the middle where it is long."""
    return _SHORT.repr(value)


def brief(message: str) -> str:
    """A message as servers tell it, cut at the end where it is long."""
    return message if len(message) <= LONGEST else message[: LONGEST - 1] + "…"


class RtpLlmError(Exception):
    code = 500
    name = "UNKNOWN_ERROR"
    status = 500
    exit_code = 1

    @property
    def code_str(self) -> str:
        return f"{self.code}_{self.name}"


class UserError(RtpLlmError):
    code = 507
    name = "BAD_REQUEST_FIELD"
    status = 400
    exit_code = 2


class EmptyPrompt(UserError):
    code = 510
    name = "EMPTY_PROMPT_ERROR"


class PromptTooLong(UserError):
    code = 511
    name = "LONG_PROMPT_ERROR"


class GenerationTimeout(UserError):
    code = 514
    name = "GENERATE_TIMEOUT"
    status = 408


class GenerateConfigError(UserError):
    code = 604
    name = "ERROR_GENERATE_CONFIG_FORMAT"


class NotSupportedYet(GenerateConfigError):
    pass


class Overloaded(UserError):
    code = 409
    name = "CONCURRENCY_LIMIT_ERROR"
    status = 429


class NotReady(UserError):
    code = 503
    name = "NOT_READY"
    status = 503


class BadField(UserError):
    """One field of a request is wrong; `param` names it."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class ImageError(UserError):
    pass


class ImageInputTooLong(ImageError):
    code = 901
    name = "MM_LONG_PROMPT_ERROR"


class ImageWrongFormat(ImageError):
    code = 902
    name = "MM_WRONG_FORMAT_ERROR"


class ImageDecodeError(ImageError):
    code = 903
    name = "MM_PROCESS_ERROR"


class ImageUnsupported(ImageError):
    code = 905
    name = "MM_NOT_SUPPORTED_ERROR"


class ImageDownloadFailed(ImageError):
    code = 906
    name = "MM_DOWNLOAD_FAILED"


class CheckpointError(UserError):
    name = "CHECKPOINT_ERROR"


class UnknownArchitecture(CheckpointError):
    name = "UNKNOWN_ARCHITECTURE"


class BundleError(UserError):
    name = "BUNDLE_ERROR"


class MissingDependency(UserError):
    name = "MISSING_DEPENDENCY"


class InternalError(RtpLlmError):
    pass


class VisionGraphMissing(InternalError):
    code = 904
    name = "MM_EMPTY_ENGINE_ERROR"


class VisionFailed(InternalError):
    code = 907
    name = "MM_ENGINE_ERROR"


class VerificationFailed(InternalError):
    name = "VERIFICATION_FAILED"
