"Readers of public data sets in their official layouts, and of annotation tools' formats."
from . import tools # enters its readers for the folder annotations/ of a data folder
