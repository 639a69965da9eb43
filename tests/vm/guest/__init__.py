"""What runs inside the virtual machine. Copied there; needs the product and Python's library."""
