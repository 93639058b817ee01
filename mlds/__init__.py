__version__ = "0.1.0"

import warnings

# fastai still calls it when it is imported; there is nothing that a user could do about it
warnings.filterwarnings('ignore', '.*torch.jit.script.* is deprecated', FutureWarning)
