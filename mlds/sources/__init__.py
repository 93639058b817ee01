"Readers of public data sets in their official layouts, and of annotation tools' formats."
