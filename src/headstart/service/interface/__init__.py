"""The types that an API hands to the service and gets back."""
