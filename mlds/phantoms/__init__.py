"Images with exact masks, drawn from a seed: the embedded default data."
