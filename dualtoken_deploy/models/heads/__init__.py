"""Dense prediction on the stage maps of a classifier: neck, detection, instance and semantic segmentation heads."""
