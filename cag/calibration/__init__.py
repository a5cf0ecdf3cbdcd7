"""Making the codec `transform` for a model: observe its keys and values on a text, fit a basis, store it.

In: a model, a store, texts. Out: a codec configuration that names the basis in the store.
"""

from cag.calibration.fit import fit_basis
from cag.calibration.making import Calibration, CalibrationOptions, calibrate, make_basis
from cag.calibration.model_basis import model_codec
from cag.calibration.observe import observe
from cag.calibration.texts import own_texts

__all__ = [
    "Calibration",
    "CalibrationOptions",
    "calibrate",
    "fit_basis",
    "make_basis",
    "model_codec",
    "observe",
    "own_texts",
]
