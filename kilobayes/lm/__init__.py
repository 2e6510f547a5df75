"""Language models under a posterior: texts scored and written with probabilities averaged over draws."""
