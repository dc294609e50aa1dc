"""Regularisers of parameter trees and proximal operators on arrays."""
