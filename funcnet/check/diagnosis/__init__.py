"""What a wrong gradient looks like."""
