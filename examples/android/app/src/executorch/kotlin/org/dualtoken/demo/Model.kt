package org.dualtoken.demo

import android.content.Context
import java.io.File
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** model.pte by ExecuTorch and XNNPACK. It is loaded from a file, so the asset is copied once. */
class Model(context: Context, contract: Contract) {
    private val shape = longArrayOf(1, contract.height.toLong(), contract.width.toLong(), 3)
    private val module = Module.load(copied(context, "model.pte").path)

    /** Logits of RGB bytes. */
    fun run(rgb: ByteArray): FloatArray {
        val image = EValue.from(Tensor.fromBlobUnsigned(rgb, shape))
        return module.forward(image)[0].toTensor().dataAsFloatArray
    }

    private fun copied(context: Context, name: String): File {
        val file = File(context.filesDir, name)
        context.assets.open(name).use { from -> file.outputStream().use { from.copyTo(it) } }
        return file
    }
}
