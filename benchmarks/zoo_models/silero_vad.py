"""A voice-activity net (Silero VAD, 16 kHz: four convolutions and an LSTM cell, 0.31 M parameters).

Speech is synthesised (espeak-ng must be installed), with pauses, in white and pink noise at 0 to 10
dB; a chunk of 512 values is speech where the clean signal is. The score is 100 x the area under the
ROC curve over the chunks of 24 clips; 12 others are the samples. The short-time Fourier transform
is a fixed convolution of the weights file, which is compressed with the rest.
"""

import subprocess
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from scipy.signal import resample_poly
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.tasks import data_path
from benchmarks.zoo_models.packages import packaged
from dither import Data

SCORE, LESS = "area under ROC, %", False
_RATE, _CHUNK, _CONTEXT, _SECONDS = 16_000, 512, 64, 6
_TESTED, _SAMPLED = 24, 12
_VOICES = ("en-us", "en-gb", "de", "fr", "es", "it")


class SileroVAD(nn.Module):
    """Sound ``(rows, values)`` at 16 kHz to probabilities of speech ``(rows, chunks)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor) -> Tensor:
        padded = functional.pad(sound, (_CONTEXT, 0))
        state, found = None, []
        for start in range(0, sound.shape[1], _CHUNK):
            x = padded[:, start : start + _CHUNK + _CONTEXT]
            x = functional.pad(x, (0, _CONTEXT), mode="reflect").unsqueeze(1)
            real, imaginary = self.stft_conv(x).chunk(2, 1)
            x = (real.square() + imaginary.square()).sqrt()
            for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
                x = layer(x).relu()
            state = self.lstm_cell(x.squeeze(-1), state)
            found.append(self.final_conv(state[0].relu().unsqueeze(-1)).sigmoid()[:, 0])
        return torch.cat(found, 1)


def load() -> nn.Module:
    """The model with the package's weights."""
    model = SileroVAD()
    model.load_state_dict(load_file(packaged("silero_vad", "data/silero_vad_16k.safetensors")))
    return model.eval()


def evaluate(model: nn.Module) -> float:
    """Area under the ROC curve, by ranks."""
    sounds, labels = _clips(0, _TESTED)
    with torch.no_grad():
        scores = model(sounds).numpy().ravel()
    flat = labels.numpy().ravel()
    ranks = rankdata(scores)
    positives = int(flat.sum())
    above = ranks[flat].sum() - positives * (positives + 1) / 2
    return 100 * float(above) / (positives * (len(flat) - positives))


def samples() -> Data:
    """Other clips, four in a batch."""
    sounds, _ = _clips(_TESTED, _TESTED + _SAMPLED)
    return Data(list(sounds.split(4)))


@cache
def _clips(start: int, end: int) -> tuple[Tensor, Tensor]:
    made = [_clip(number) for number in range(start, end)]
    sounds, labels = zip(*made, strict=True)
    return torch.stack(sounds), torch.stack(labels)


def _clip(number: int) -> tuple[Tensor, Tensor]:
    """Sound with noise, and which chunks are speech."""
    generator = np.random.default_rng(number)
    lines = data_path("sst2/dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    clean = np.zeros(_SECONDS * _RATE)
    at = int(generator.uniform(0.5, 1.5) * _RATE)
    while at < len(clean):
        text = lines[int(generator.integers(len(lines)))].partition("\t")[0]
        speech = _speech(text, _VOICES[number % len(_VOICES)])[: 2 * _RATE]
        clean[at : at + len(speech)] += speech[: len(clean) - at]
        at += len(speech) + int(generator.uniform(0.5, 1.5) * _RATE)
    noise = generator.standard_normal(len(clean))
    if number % 2:  # pink: the spectrum falls by 3 dB an octave
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), len(clean))
    loud = clean[np.abs(clean) > 0.01]
    level = np.sqrt(np.mean(loud**2)) * 10 ** (-generator.uniform(0, 10) / 20)
    noisy = clean + noise * level / np.sqrt(np.mean(noise**2))
    noisy *= 0.5 / np.abs(noisy).max()
    chunks = len(clean) // _CHUNK
    power = np.square(clean[: chunks * _CHUNK]).reshape(chunks, _CHUNK).mean(1)
    sound = torch.from_numpy(noisy[: chunks * _CHUNK]).float()
    return sound, torch.from_numpy(np.sqrt(power) > 0.005)


def _speech(text: str, voice: str) -> npt.NDArray[np.float64]:
    """What espeak-ng says, at 16 kHz."""
    try:
        said = subprocess.run(
            ["espeak-ng", "-v", voice, "--stdout", text], check=True, capture_output=True
        )
    except FileNotFoundError as error:
        raise FileNotFoundError("espeak-ng is not installed; it is a Debian package") from error
    # The header has no length, since it was written into a pipe.
    values = np.frombuffer(said.stdout[44:], dtype="<i2").astype(np.float64) / 2**15
    return np.asarray(resample_poly(values, 320, 441), dtype=np.float64)
