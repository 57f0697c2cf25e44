"""FADE: saliency, masks, sparse LoRA and self-distillation, a file an idea (arXiv:2602.07058)."""
