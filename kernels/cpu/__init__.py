"""The backend of CPUs: new rows and attention over codes in C, compiled when first needed."""
