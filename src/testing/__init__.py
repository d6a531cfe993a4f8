"""What tests of this package and of plug-ins share: tiny random models, and the contract that every method keeps."""
