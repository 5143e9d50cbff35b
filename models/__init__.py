"""The frozen timm backbone, the hierarchical heads, the classifier that joins them, and its checkpoint."""
