"""PuzzleMix, piece by piece: saliency, what a mask costs, the cheapest mask, where its blocks are moved, and noise."""
