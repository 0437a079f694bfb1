"""What leaves the hospital: a sealed folder, the gate before it and the check after it."""
